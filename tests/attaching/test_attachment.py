"""What is attached does what the plan says, and is undone exactly."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import pickle
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from support import tiny

import cachekit
from cachekit import After, Choice, Drop, Guidance, Observation, Policy
from cachekit.errors import AttachmentError
from cachekit.switches.roles import Member
from cachekit.switches.switch import Switch
from cachekit.tensors import tensors
from cachekit.upstream.pipelines import denoiser_of

MAKERS: dict[str, Callable[[], Any]] = {
    "sd": tiny.small,
    "sdxl": tiny.sdxl,
    "pixart": tiny.pixart,
    "sigma": functools.partial(tiny.pixart, sigma=True),
    "dit": tiny.dit,
    "svd": tiny.svd,
}
UNETS = ("sd", "sdxl", "svd")
TEXT = ("sd", "sdxl", "pixart", "sigma", "svd")
ALL = tuple(MAKERS)
BOTH = ("tgate:m=3", "deepcache:interval=2")

shared = tiny.sharing(MAKERS)


@pytest.fixture
def pipe() -> Any:
    return tiny.small()


# -- calls counted by hooks inside the model --------------------------------------------------------------

WATCHED = {
    "root": re.compile(r"(conv_in|pos_embed\.proj)"),
    "cross": re.compile(r".*\.attn2\.to_k"),
    "self": re.compile(r".*\.attn1\.to_k"),
    "deep": re.compile(r"(mid_block|down_blocks\.1)\..*conv1"),
    "shallow": re.compile(r"down_blocks\.0\.resnets\.0(\.spatial_res_block)?\.conv1"),
    "end": re.compile(r"conv_out"),
}


class Watch:
    """Write down the batch of every watched module in every call of the denoiser."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.step = -1
        self.seen: dict[str, dict[int, int]] = {}
        self.handles = [denoiser.register_forward_pre_hook(self.tick)]
        for name, module in denoiser.named_modules():
            if any(pattern.fullmatch(name) for pattern in WATCHED.values()):
                self.seen[name] = {}
                self.handles.append(module.register_forward_hook(functools.partial(self.note, name)))

    def tick(self, *_: Any) -> None:
        self.step += 1

    def note(self, name: str, module: Any, args: Any, output: torch.Tensor) -> None:
        assert self.step not in self.seen[name]
        self.seen[name][self.step] = output.shape[0]

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@functools.cache
def plain(name: str, steps: int) -> tuple[torch.Tensor, dict[str, int]]:
    """Compute the latents without any policy, and the guided batch of every watched module."""
    with Watch(denoiser_of(shared(name))) as watch:
        latents = tiny.latents(shared(name), steps=steps)
    assert all(len(batches) == steps for batches in watch.seen.values())
    return latents, {module: batches[0] for module, batches in watch.seen.items()}


def marks(name: str, watch: Watch, role: str, steps: int) -> set[str]:
    """Write what the modules of a role did: per step the number of branches, or a dot for none."""
    guided = plain(name, steps)[1]
    return {
        "".join(str(2 * batches[step] // guided[module]) if step in batches else "." for step in range(steps))
        for module, batches in watch.seen.items()
        if WATCHED[role].fullmatch(module)
    }


CASES: list[tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]] = [
    (("tgate:m=3",), TEXT, {"root": "222111", "cross": "222...", "self": "222111"}),
    (("tgate:m=1,keep=cond",), TEXT, {"root": "21111", "cross": "2....", "self": "21111"}),
    (
        ("tgate:m=5,sp_interval=3,fi_interval=2,warm_up=1",),
        TEXT,
        {"root": "22222111", "cross": "22222...", "self": "22.22.1."},
    ),
    (("cair:n=3",), TEXT, {"root": "222111", "cross": "222...", "self": "222111"}),
    (("deepcache:interval=3",), UNETS, {"root": "222222", "shallow": "2..2..", "deep": "2..2..", "end": "222222"}),
    (("deepcache:interval=2,branch=1",), UNETS, {"root": "22222", "shallow": "22222", "deep": "2.2.2"}),
    (("deepcache:interval=3,start=1,end=5",), UNETS, {"root": "222222", "deep": "22..22"}),
    (("adaptive_guidance:m=3",), ALL, {"root": "222111"}),
    (("adaptive_guidance:m=2,linear=true",), ALL, {"root": "22111"}),
    (("null_text:after=4",), ALL, {"root": "222211"}),
    (("null_text:before=2",), ALL, {"root": "112222"}),
    (
        ("tgate:m=6", "deepcache:interval=4"),
        UNETS,
        {"root": "2222221111", "deep": "2...221...", "end": "2222221111"},
    ),
    (
        ("deepcache:interval=3,branch=1", "adaptive_guidance:m=4"),
        UNETS,
        {"root": "22221111", "shallow": "22221111", "deep": "2..21..1"},
    ),
    (
        ("tgate:m=4,sp_interval=2,fi_interval=2,warm_up=1", "deepcache:interval=3"),
        UNETS,
        {"root": "2222111"},
    ),
]


@pytest.mark.parametrize(
    ("name", "specs", "expected"),
    [
        pytest.param(name, specs, roles, id=f"{name}-{'+'.join(specs)}")
        for specs, names, roles in CASES
        for name in names
    ],
)
def test_applied_runs_the_plan_undone_is_equal_and_again_is_the_same(
    name: str, specs: tuple[str, ...], expected: dict[str, str]
) -> None:
    pipe, steps = shared(name), len(expected["root"])
    without = plain(name, steps)[0]
    with cachekit.apply(pipe, specs) as attachment, Watch(denoiser_of(pipe)) as watch:
        first = tiny.latents(pipe, steps=steps)
        rows = attachment.report().record.rows
    assert not torch.equal(first, without)
    roles = [role for role in expected if role != "cross" or name != "dit"]
    assert {role: marks(name, watch, role, steps) for role in roles} == {role: {expected[role]} for role in roles}
    assert "".join(str(len(row.branches)) for row in rows) == expected["root"]
    assert torch.equal(tiny.latents(pipe, steps=steps), without)
    with cachekit.apply(pipe, specs):
        assert torch.equal(tiny.latents(pipe, steps=steps), first)
        assert torch.equal(tiny.latents(pipe, steps=steps), first)


@pytest.mark.parametrize("specs", [("tgate:m=3,sp_interval=2",), ("deepcache:interval=3",), BOTH])
def test_the_report_counts_what_ran(pipe: Any, specs: tuple[str, ...]) -> None:
    with cachekit.apply(pipe, specs) as attachment, Watch(denoiser_of(pipe)) as watch:
        tiny.latents(pipe, steps=6)
    ran = {role: sum(len(watch.seen[name]) for name in watch.seen if WATCHED[role].fullmatch(name)) for role in WATCHED}
    for count in attachment.report().counts:
        role = {"cross_attention": "cross", "self_attention": "self"}.get(count.kind)
        if role:
            # Those that lie in a skipped region are not called at all.
            assert count.computed + count.stored == ran[role]
        assert count.missed == 0
        assert count.reused > 0


# -- by hand ----------------------------------------------------------------------------------------------


def loop(unet: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor], steps: int) -> torch.Tensor:
    """Sample with DDIM; `unet` gives the guided prediction from latents, timestep and step."""
    scheduler = tiny.small().scheduler
    scheduler.set_timesteps(steps)
    latents = start()
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            latents = scheduler.step(unet(latents, t, step), t, latents).prev_sample
    return latents


def start(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(5))


EMBEDDINGS = torch.cat([tiny.text(1, seed=4), tiny.text(1)])


def test_tgate_by_hand(pipe: Any) -> None:
    unet, m = tiny.small().unet, 3
    attention = tiny.TgateByHand(unet)

    def predict(latents: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        attention.mode = {m - 1: "keep the mean"}.get(step, "reuse" if step >= m else "")
        if step < m:
            return tiny.guide(unet(torch.cat([latents] * 2), t, EMBEDDINGS).sample)
        return unet(latents, t, EMBEDDINGS[:1]).sample

    with cachekit.apply(pipe, f"tgate:m={m}"):
        assert torch.equal(tiny.latents(pipe, steps=6, latents=start()), loop(predict, 6))


def shallow(unet: Any, sample: torch.Tensor, t: torch.Tensor, text: torch.Tensor, deep: torch.Tensor) -> torch.Tensor:
    """Run what DeepCache's branch 0 leaves of a skipped step."""
    embedding = unet.time_embedding(unet.time_proj(t.expand(len(sample))))
    last = unet.up_blocks[-1]
    hidden = last.resnets[-1](torch.cat([deep, unet.conv_in(sample)], dim=1), embedding)
    hidden = last.attentions[-1](hidden, encoder_hidden_states=text).sample
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))


def test_deepcache_by_hand(pipe: Any) -> None:
    unet, kept = tiny.small().unet, []
    unet.up_blocks[-1].attentions[-2].register_forward_hook(lambda module, args, output: kept.append(output[0]))

    def predict(latents: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        sample = torch.cat([latents] * 2)
        if step % 3 == 0:
            return tiny.guide(unet(sample, t, EMBEDDINGS).sample)
        return tiny.guide(shallow(unet, sample, t, EMBEDDINGS, kept[-1]))

    with cachekit.apply(pipe, "deepcache:interval=3"):
        assert torch.equal(tiny.latents(pipe, steps=7, latents=start()), loop(predict, 7))


# -- undo -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_nothing_remains_after_a_run_and_remove(name: str) -> None:
    pipe = MAKERS[name]()
    tiny.latents(pipe, steps=1)
    for spec in (
        ("adaptive_guidance:m=2",) if name == "dit" else ("tgate:m=2,sp_interval=2", *BOTH[1:] * (name in UNETS))
    ):
        before = {key: value for key, value in vars(pipe).items() if not key.startswith("_")}
        with tiny.leaves_no_trace(pipe):
            attachment = cachekit.apply(pipe, spec)
            attachment.remove()
            attachment.remove()
        cachekit.apply(pipe, spec)
        tiny.latents(pipe, steps=3)
        modules = tiny.state_of(pipe)
        cachekit.remove(pipe)
        cachekit.remove(pipe)
        assert type(pipe) is type(MAKERS[name]())
        assert tiny.state_of(pipe) != modules
        assert {key: value for key, value in vars(pipe).items() if not key.startswith("_")} == before
        assert not any("forward" in vars(module) for module in denoiser_of(pipe).modules())


def test_modules_are_as_they_were_after_runs(pipe: Any) -> None:
    tiny.latents(pipe, steps=1)
    before = tiny.state_of(pipe)[1:]
    with cachekit.apply(pipe, BOTH):
        tiny.latents(pipe, steps=4)
        tiny.latents(pipe, steps=3, batch=2, guidance=1.0)
        assert tiny.state_of(pipe)[1:] != before
    assert tiny.state_of(pipe)[1:] == before


@pytest.mark.parametrize("count", [0, 1, 7, -1])
def test_an_exception_half_way_through_apply_changes_nothing(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    installed: list[Switch] = []
    install = Switch.install
    with cachekit.apply(pipe, BOTH) as attachment:
        limit = count % sum(map(len, attachment.driver.installation.switches.values()))

    def fail(switch: Switch) -> None:
        if len(installed) == limit:
            raise RuntimeError("broken")
        installed.append(switch)
        install(switch)

    monkeypatch.setattr(Switch, "install", fail)
    with tiny.leaves_no_trace(pipe), pytest.raises(RuntimeError, match="broken"):
        cachekit.apply(pipe, BOTH)
    monkeypatch.undo()
    assert len(installed) == limit
    with cachekit.apply(pipe, BOTH):
        assert torch.isfinite(tiny.latents(pipe, steps=4)).all()


@pytest.mark.parametrize("at", ["cachekit.driving.entrance.Entrance.install", "cachekit.attaching.attachment.track"])
def test_an_exception_at_the_root_changes_nothing(pipe: Any, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with tiny.leaves_no_trace(pipe):
        monkeypatch.setattr(at, fail)
        with pytest.raises(KeyboardInterrupt):
            cachekit.apply(pipe, BOTH)


@pytest.mark.parametrize("spec", ["tgate:m=x", "tgaet", "deepcache:branch=99", "tgate:m=0", "deepcache:interval=0"])
def test_a_refused_spec_changes_nothing(pipe: Any, spec: str) -> None:
    with tiny.leaves_no_trace(pipe), pytest.raises(cachekit.CachekitError):
        cachekit.apply(pipe, ["adaptive_guidance:m=2", spec])


def test_a_second_apply_is_refused_and_the_first_stays(pipe: Any) -> None:
    with cachekit.apply(pipe, "tgate:m=2"):
        first = tiny.latents(pipe, steps=4)
        with tiny.leaves_no_trace(pipe), pytest.raises(AttachmentError, match="remove"):
            cachekit.apply(pipe, "deepcache")
        assert torch.equal(tiny.latents(pipe, steps=4), first)


def test_remove_also_finds_a_denoiser_that_was_replaced_since(pipe: Any) -> None:
    with tiny.leaves_no_trace(pipe.unet):
        cachekit.apply(pipe, BOTH)
        pipe.unet = tiny.small().unet
        cachekit.remove(pipe)
    assert type(pipe) is StableDiffusionPipeline


def test_an_attached_pipeline_is_not_pickled_but_says_why(pipe: Any) -> None:
    with cachekit.apply(pipe, "tgate:m=2"):
        for attached in (pipe, pipe.unet):
            with pytest.raises(AttachmentError, match="remove"):
                pickle.dumps(attached)
        other = type(pipe)(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    for undone in (pipe, other):
        assert torch.equal(tiny.latents(pickle_copy(undone), steps=2), tiny.latents(pipe, steps=2))


class Rebuilt(StableDiffusionPipeline):
    """A pipeline that says itself how it is copied."""

    def __reduce__(self) -> Any:
        return rebuilt, (self.components,)


def rebuilt(parts: dict[str, Any]) -> Any:
    pipe = Rebuilt(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_that_says_how_it_is_copied_is_asked(pipe: Any) -> None:
    own = rebuilt(pipe.components)
    with cachekit.apply(own, "tgate:m=2"):
        twin = copy.deepcopy(own)
        assert torch.equal(tiny.latents(twin, steps=3), tiny.latents(own, steps=3))
        assert twin.unet is not own.unet


def pickle_copy(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


def test_context_manager_undoes_after_an_exception(pipe: Any) -> None:
    with tiny.leaves_no_trace(pipe), pytest.raises(ZeroDivisionError), cachekit.apply(pipe, BOTH):
        raise ZeroDivisionError


def test_remove_in_the_middle_of_a_run_makes_the_rest_plain(pipe: Any) -> None:
    attachment = cachekit.apply(pipe, "adaptive_guidance:m=2")

    def stop(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            cachekit.remove(pipe)
        return given

    with Watch(denoiser_of(pipe)) as watch:
        tiny.latents(pipe, steps=6, callback_on_step_end=stop)
    assert list(watch.seen["conv_in"].values()) == [2, 2, 1, 1, 2, 2]
    assert type(pipe) is StableDiffusionPipeline
    assert not attachment.driver.installation.switches
    assert torch.equal(tiny.latents(pipe, steps=6), plain("sd", 6)[0])


def test_remove_in_the_middle_of_a_call_makes_that_call_plain(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread may do, between what is skipped and what would have been restored."""

    def stop(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            cachekit.remove(pipe)
        return given

    cachekit.apply(pipe, "deepcache:interval=3")
    expected = tiny.latents(pipe, steps=4, callback_on_step_end=stop)
    before = Member.before

    def skip(member: Member, *given: Any) -> Any:
        found = before(member, *given)
        if isinstance(found, tuple):
            thread = threading.Thread(target=attachment.remove)
            thread.start()
            thread.join()
        return found

    attachment = cachekit.apply(pipe, "deepcache:interval=3")
    monkeypatch.setattr(Member, "before", skip)
    assert torch.equal(tiny.latents(pipe, steps=4), expected)
    assert not attachment.driver.installation.switches


def test_a_wrapper_put_on_later_survives_the_undo(pipe: Any) -> None:
    attachment = cachekit.apply(pipe, "tgate:m=2")
    modules = [module for name, module in pipe.unet.named_modules() if name.endswith("attn2")]
    with_policy = tiny.latents(pipe, steps=4)
    for module in modules:
        add_hook_to_module(module, ModelHook())
    assert torch.equal(tiny.latents(pipe, steps=4), with_policy)
    attachment.remove()
    assert not any(isinstance(value, Switch) for module in modules for value in vars(module).values())
    assert torch.equal(tiny.latents(pipe, steps=4), plain("sd", 4)[0])
    for module in modules:
        remove_hook_from_module(module)
    assert torch.equal(tiny.latents(pipe, steps=4), plain("sd", 4)[0])


def test_a_hook_put_on_before_stays(pipe: Any) -> None:
    module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    add_hook_to_module(module, ModelHook())
    with tiny.leaves_no_trace(pipe):
        cachekit.apply(pipe, "tgate:m=2").remove()


def test_a_lost_switch_is_an_error_that_says_what_to_do(pipe: Any) -> None:
    cachekit.apply(pipe, "tgate:m=2")
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2 = copy.deepcopy(block.attn2)
    with pytest.raises(AttachmentError, match=r"mid_block.*apply again"):
        tiny.latents(pipe, steps=3)
    cachekit.remove(pipe)
    assert torch.equal(tiny.latents(pipe, steps=3), plain("sd", 3)[0])


@pytest.mark.parametrize(("pause", "full"), [((1, 2), [0, 1, 2, 3]), ((2, 3), [0, 2, 3, 4]), ((3, 4), [0, 3, 4, 5])])
def test_steps_that_are_paused_go_by(pipe: Any, pause: tuple[int, ...], full: list[int]) -> None:
    """What a paused step would have kept anew is kept no more: the next one that wants it keeps it."""
    step, ran = 0, []

    with cachekit.apply(pipe, "deepcache:interval=3") as attachment, contextlib.ExitStack() as paused:
        handle = pipe.unet.mid_block.register_forward_hook(lambda *_: ran.append(step))

        def follow(_: Any, done: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal step
            step = done + 1
            paused.close()
            if step in pause:
                paused.enter_context(attachment.paused())
            return tensors

        tiny.latents(pipe, steps=6, callback_on_step_end=follow)
        handle.remove()
        assert ran == full
        assert attachment.report().steps == 6


def test_a_paused_look_ahead_is_no_step(pipe: Any) -> None:
    """A callback may try the loop's own later timesteps."""
    specs = ["tgate:m=3", "deepcache:interval=2"]

    def look(_: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with attachment.paused():
            for ahead in pipe.scheduler.timesteps[step:]:
                pipe.unet(tensors["latents"], ahead, encoder_hidden_states=tiny.text(1))
        return tensors

    with cachekit.apply(pipe, specs) as attachment:
        alone = tiny.latents(pipe, steps=6)
        counts = attachment.report().counts
        assert torch.equal(tiny.latents(pipe, steps=6, callback_on_step_end=look), alone)
        assert (attachment.report().counts, attachment.report().earlier) == (counts, ())


def test_another_pipeline_in_a_callback_is_a_stranger(pipe: Any) -> None:
    parts = {**pipe.components, "scheduler": tiny.small().scheduler}
    other = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    plain = tiny.latents(other, steps=4, image=image, strength=0.5)

    def draw(_: Any, step: int, time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            assert torch.equal(tiny.latents(other, steps=4, image=image, strength=0.5), plain)
        return tensors

    with cachekit.apply(pipe, ["tgate:m=3", "deepcache:interval=2"]) as attachment:
        alone = tiny.latents(pipe, steps=6)
        assert torch.equal(tiny.latents(pipe, steps=6, callback_on_step_end=draw), alone)
        assert (attachment.report().steps, attachment.report().earlier) == (6, ())


def test_paused_runs_are_plain(pipe: Any) -> None:
    with cachekit.apply(pipe, BOTH) as attachment:
        first = tiny.latents(pipe, steps=4)
        with attachment.paused():
            assert torch.equal(tiny.latents(pipe, steps=4), plain("sd", 4)[0])
        with pytest.raises(ZeroDivisionError), attachment.paused():
            raise ZeroDivisionError
        assert torch.equal(tiny.latents(pipe, steps=4), first)


# -- what others see --------------------------------------------------------------------------------------


def test_the_pipeline_keeps_its_class_and_keys(pipe: Any) -> None:
    keys = list(pipe.unet.state_dict())
    names = [name for name, _ in pipe.unet.named_modules()]
    with cachekit.apply(pipe, BOTH):
        assert isinstance(pipe, StableDiffusionPipeline)
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        assert type(pipe).__module__ == StableDiffusionPipeline.__module__
        assert list(pipe.unet.state_dict()) == keys
        assert [name for name, _ in pipe.unet.named_modules()] == names
        assert StableDiffusionPipeline.__call__ is not type(pipe).__call__
    assert type(pipe) is StableDiffusionPipeline


def test_an_attached_pipeline_is_saved_as_itself(pipe: Any, tmp_path: Any) -> None:
    with cachekit.apply(pipe, BOTH):
        tiny.latents(pipe, steps=2)
        pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    absent = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor", "safety_checker", "image_encoder"))
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tiny.latents(loaded, steps=3), plain("sd", 3)[0])


def changed(unet: torch.nn.Module) -> None:
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.5)
        unet.mid_block.resnets[0].conv1.weight.neg_()


def test_a_deep_copy_runs_on_its_own_weights(pipe: Any) -> None:
    attachment = cachekit.apply(pipe, BOTH)
    first = tiny.latents(pipe, steps=4)
    twin = copy.deepcopy(pipe)
    changed(pipe.unet)
    assert torch.equal(tiny.latents(twin, steps=4), first)
    assert not torch.equal(tiny.latents(pipe, steps=4), first)
    attachment.remove()
    assert torch.equal(tiny.latents(twin, steps=4), first)
    cachekit.remove(twin)
    assert torch.equal(tiny.latents(twin, steps=4), plain("sd", 4)[0])
    assert type(twin) is StableDiffusionPipeline
    assert not any("forward" in vars(module) for module in twin.unet.modules())


def test_a_deep_copy_in_the_middle_of_a_run_starts_empty(pipe: Any) -> None:
    cachekit.apply(pipe, BOTH)
    copies = []

    def duplicate(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            copies.append(copy.deepcopy(pipe))
        return given

    first = tiny.latents(pipe, steps=5, callback_on_step_end=duplicate)
    assert torch.equal(tiny.latents(copies[0], steps=5), first)


def test_a_call_that_is_overtaken_by_a_removal_leaves_nothing_behind(pipe: Any) -> None:
    with tiny.leaves_no_trace(pipe):
        attachment = cachekit.apply(pipe, BOTH)
        attachment.remove()  # by another thread, after the pipeline's call has found the attachment
        with attachment.run_of(pipe, (), {}):
            pass


class Shared(Policy):
    """Drops a branch, looks at both, and holds what cannot be copied."""

    name: ClassVar[str] = "shared"
    lock: Any = None

    def choices(self) -> dict[str, Choice]:
        return {"guidance": Choice(Guidance(), After(m=2), Drop())}

    def observe(self, seen: Observation, memory: dict[str, Any]) -> None:
        with self.lock:
            memory.setdefault("trace", []).append(seen.step)


def test_copies_share_the_policies_of_the_guidance(pipe: Any) -> None:
    attachment = cachekit.apply(pipe, Shared(lock=threading.Lock()))
    first = tiny.latents(pipe, steps=4)
    assert attachment.report().macs < attachment.report().baseline_macs
    assert torch.equal(tiny.latents(copy.deepcopy(pipe), steps=4), first)
    attachment.remove()


def test_removing_a_copy_leaves_the_original_attached(pipe: Any) -> None:
    cachekit.apply(pipe, BOTH)
    first = tiny.latents(pipe, steps=4)
    cachekit.remove(copy.deepcopy(pipe))
    assert torch.equal(tiny.latents(pipe, steps=4), first)


def attached_like(specs: tuple[str, ...], **changes: Any) -> torch.Tensor:
    pipe = tiny.small()
    cachekit.apply(pipe, specs)
    return tiny.latents(pipe, **changes)


def test_a_second_pipeline_with_the_same_denoiser_is_cached(pipe: Any) -> None:
    other = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": tiny.small().scheduler}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    expected = {steps: attached_like(BOTH, steps=steps) for steps in (4, 6)}
    with cachekit.apply(pipe, BOTH):
        for runner, steps in ((other, 6), (pipe, 4), (other, 6), (other, 4), (pipe, 6)):
            assert torch.equal(tiny.latents(runner, steps=steps), expected[steps])
    for runner in (pipe, other):
        assert torch.equal(tiny.latents(runner, steps=4), plain("sd", 4)[0])


def test_a_run_in_another_thread_does_not_disturb(pipe: Any) -> None:
    other = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": tiny.small().scheduler}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    expected = {steps: attached_like(BOTH, steps=steps) for steps in (5, 6)}
    found = {}

    def interject(_: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 3:
            thread = threading.Thread(target=lambda: found.update({5: tiny.latents(pipe, steps=5)}))
            thread.start()
            thread.join()
        return given

    with cachekit.apply(pipe, BOTH):
        found[6] = tiny.latents(other, steps=6, callback_on_step_end=interject)
    assert all(torch.equal(found[steps], expected[steps]) for steps in expected)


def test_a_pipeline_made_from_an_attached_one_is_cached(pipe: Any) -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def draw(source: Any) -> torch.Tensor:
        made = StableDiffusionImg2ImgPipeline.from_pipe(source)
        made.set_progress_bar_config(disable=True)
        return tiny.latents(made, steps=8, image=image, strength=0.8)

    without = draw(pipe)
    with cachekit.apply(pipe, BOTH) as attachment:
        cached = draw(pipe)
        assert len(attachment.report().record.rows) == 6
        assert sum(count.reused for count in attachment.report().counts) > 0
        assert not torch.equal(cached, without)
        text = tiny.latents(pipe, steps=4)
        assert torch.equal(draw(pipe), cached)
        assert torch.equal(tiny.latents(pipe, steps=4), text)
    own = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    with cachekit.apply(own, BOTH):
        assert torch.equal(tiny.latents(own, steps=8, image=image, strength=0.8), cached)
    assert torch.equal(draw(pipe), without)


# -- what is kept ends with the run -----------------------------------------------------------------------


def kept_by(attachment: Any) -> list[weakref.ref[torch.Tensor]]:
    entries = attachment.driver.state.run.keeper.store._histories.values()
    return [weakref.ref(tensor) for entry in entries for tensor in tensors(entry)]


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_what_is_kept_is_gone_when_the_run_ends(pipe: Any, error: type[BaseException] | None) -> None:
    references: list[weakref.ref[torch.Tensor]] = []

    def look(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            references.extend(kept_by(attachment))
            if error:
                raise error
        return given

    attachment = cachekit.apply(pipe, [*BOTH, "adaptive_guidance:m=3,linear=true"])
    caught: BaseException | None = None
    try:
        tiny.latents(pipe, steps=6, callback_on_step_end=look)
    except (ZeroDivisionError, KeyboardInterrupt) as raised:
        caught = raised
    assert (caught is not None) == (error is not None)
    gc.collect()
    assert len(references) == 8
    assert not any(reference() is not None for reference in references)


def test_what_is_kept_is_gone_although_the_exception_is_held(pipe: Any) -> None:
    """The frames of an exception inside the denoiser hold the call; the call must not hold what was kept."""
    attachment = cachekit.apply(pipe, "tgate:m=2,fi_interval=2")
    references: list[weakref.ref[torch.Tensor]] = []

    def fail(*_: Any) -> None:
        if len(attachment.report().record.rows) == 5:
            references.extend(kept_by(attachment))
            raise ZeroDivisionError

    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError) as held:
        tiny.latents(pipe, steps=6)
    gc.collect()
    assert held.value is not None
    assert len(references) == 8  # self-attention that is kept anew in this step is let go of before
    assert not any(reference() is not None for reference in references)


def test_the_report_holds_no_tensor_values(pipe: Any) -> None:
    with cachekit.apply(pipe, BOTH) as attachment:
        tiny.latents(pipe, steps=4)
        record = attachment.report().record
    assert all(tensor.untyped_storage().nbytes() <= 8 for tensor in tensors(record.inputs))


def test_a_bare_denoiser_is_attached_too() -> None:
    unet, scheduler = tiny.small().unet, DDIMScheduler()
    scheduler.set_timesteps(4)
    with cachekit.apply(unet, "deepcache:interval=2"), Watch(unet) as watch, torch.no_grad():
        for t in scheduler.timesteps:
            unet(torch.cat([start()] * 2), t, EMBEDDINGS)
    assert sorted(watch.seen["mid_block.resnets.0.conv1"]) == [0, 2]
    assert not any("forward" in vars(module) for module in unet.modules())


@pytest.mark.parametrize("make", [tiny.small, tiny.sd3, tiny.flux, tiny.wan])
def test_a_plan_has_the_timesteps_of_the_run(make: Callable[[], Any]) -> None:
    pipe = make()
    with cachekit.apply(pipe, "cache:where=block,when=every(2),what=reuse") as attachment:
        planned = attachment.plan(4).times
        tiny.latents(pipe, steps=4)
        ran = attachment.report().record.times
    assert [time.timestep for time in planned] == pytest.approx([time.timestep for time in ran])
    assert len({time.timestep for time in ran}) == 4


def test_timesteps_that_depend_on_the_size_are_open_in_a_plan() -> None:
    pipe = tiny.flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with cachekit.apply(pipe, "pab") as attachment:
        assert not attachment.plan(4).is_static
