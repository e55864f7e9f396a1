"""After whatever breaks a run, the next one is clean; what is missing is computed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from support import tiny
from support.policies import FirstBlock

import cachekit
from cachekit import PluginError, PolicyError, Region
from cachekit.registry.catalog import installed
from cachekit.upstream.pipelines import denoiser_of

STEPS = 4
MAKERS = {"sd": tiny.small, "sdxl": tiny.sdxl, "pixart": tiny.pixart, "svd": tiny.svd}
ALL = ("tgate:m=3,sp_interval=2", "deepcache:interval=2", "adaptive_guidance:m=3,linear=true")
# The run before the fault and the one after it differ in everything.
AFTER = {"steps": 4, "batch": 2, "height": 24, "width": 32}


@functools.cache
def expected() -> torch.Tensor:
    pipe = tiny.small()
    cachekit.apply(pipe, ALL)
    return tiny.latents(pipe, **AFTER)


@functools.cache
def attached() -> Any:
    pipe = tiny.small()
    cachekit.apply(pipe, ALL)
    return pipe


# -- an exception anywhere ----------------------------------------------------------------------------------

COMPOSITIONS: list[tuple[str, tuple[Any, ...]]] = [
    ("sd", ("tgate:m=3,sp_interval=2", "deepcache:interval=2")),
    ("sd", ("deepcache:interval=2,branch=1", "adaptive_guidance:m=2,linear=true")),
    ("pixart", ("tgate:m=2,sp_interval=2",)),
    ("pixart", ("adaptive_guidance:threshold=-1,linear=true", "null_text:before=1")),
    ("pixart", ("tgate:m=3", "cache:where=span(first=0,stop=2),when=every(3),what=linear(of=residual)")),
]
ERRORS = (RuntimeError, KeyboardInterrupt)
OUTSIDE = (("scheduler", "scheduler", "step"), ("vae", "vae", "decode"))


@dataclasses.dataclass(frozen=True)
class Fault:
    """Raise in a step at a place, before or after what runs there."""

    place: str
    step: int
    error: type[BaseException]
    late: bool


@contextmanager
def watching(pipe: Any, names: dict[str, str], see: Callable[[str, int, bool], None]) -> Iterator[None]:
    """Call `see` with place, step and whether it has run, wherever something runs in the pipeline's calls."""
    step = -1
    denoiser = denoiser_of(pipe)

    def tick(*_: Any) -> None:
        nonlocal step
        step += 1

    def seeing(place: str, late: bool) -> Callable[..., None]:
        return lambda *_: see(place, step, late)

    def around(place: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            see(place, step, False)
            output = original(*args, **kwargs)
            see(place, step, True)
            return output

        return run

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        stack.callback(denoiser.register_forward_pre_hook(tick).remove)
        for place, name in names.items():
            module = denoiser.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(seeing(place, False)).remove)
            stack.callback(module.register_forward_hook(seeing(place, True)).remove)
        for place, owner, method in OUTSIDE:
            held = getattr(pipe, owner)
            patch.setattr(held, method, around(place, getattr(held, method)))
        yield


def run_with(pipe: Any, names: dict[str, str], see: Callable[[str, int, bool], None]) -> None:
    """Draw, in a way that differs in everything from the runs that come after it."""

    def callback(*given: Any) -> Any:
        see("callback", given[0] if isinstance(given[0], int) else given[1], False)
        return given[-1]

    name = "callback_on_step_end" if hasattr(pipe, "unet") else "callback"
    with watching(pipe, names, see):
        tiny.latents(pipe, steps=STEPS, guidance=3.0, seed=1, output_type="pt", **{name: callback})


def named_places(attachment: Any) -> dict[str, str]:
    """Find the last module of each kind."""
    (denoiser,) = attachment.setup.denoisers.values()
    names = {str(site.kind): site.name for site in sorted(denoiser.sites.sites, key=lambda site: site.name)}
    for region in (bound.target for bound in attachment.setup.assignments if isinstance(bound.target, Region)):
        names |= {"member": region.skipped[0], "exit": region.exit}
    return {**names, "root": ""}


@pytest.mark.parametrize(("name", "specs"), COMPOSITIONS)
def test_whatever_breaks_a_run_no_later_image_is_lost(name: str, specs: tuple[Any, ...]) -> None:
    pipe = tiny.small(layers_per_block=1, sample_size=8) if name == "sd" else tiny.pixart()
    plain = tiny.latents(pipe, steps=3)
    attachment = cachekit.apply(pipe, specs)
    expected, names = tiny.latents(pipe, steps=3), named_places(attachment)
    assert not torch.equal(expected, plain)
    seen: dict[tuple[str, int, bool], None] = {}
    run_with(pipe, names, lambda *where: seen.update({where: None}))
    assert {place for place, *_ in seen} == {*names, "scheduler", "callback", "vae"}
    assert {step for place, step, _ in seen if place == "root"} == set(range(STEPS))
    lost = []
    for number, where in enumerate(seen):
        fault = Fault(*where[:2], ERRORS[number % 2], where[2])

        def fail(*now: Any, where: Any = where, error: type[BaseException] = fault.error) -> None:
            if now == where:
                raise error

        with pytest.raises(fault.error):
            run_with(pipe, names, fail)
        assert attachment.driver.state.run is None
        assert attachment.report().record.interrupted
        if not torch.equal(tiny.latents(pipe, steps=3), expected):
            lost.append(fault)
    assert lost == []
    assert len(seen) > 45
    attachment.remove()
    assert torch.equal(tiny.latents(pipe, steps=3), plain)


class Stubborn(StableDiffusionPipeline):
    """Refuse to be tracked, after everything else has been put in place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise Broken
        super().__setattr__(name, value)


class Broken(Exception):
    """Stand for any error of somebody else's code."""


def broken(*_: Any, **__: Any) -> Any:
    raise Broken


def broken_adapter(method: str) -> Any:
    """Make the installed catalog with an adapter that fails when asked for its sites or its layout."""
    catalog = installed()
    good = catalog.adapters["unet"]
    bad = type("Bad", (type(good),), {method: broken})()
    return dataclasses.replace(catalog, adapters={**catalog.adapters, "unet": bad})


@pytest.mark.parametrize("method", ["sites", "layout"])
def test_an_adapter_that_fails_leaves_nothing_behind(method: str) -> None:
    pipe = tiny.small()
    with tiny.leaves_no_trace(pipe), pytest.raises(PluginError, match=f"failed in {method} of its adapter 'unet'"):
        cachekit.apply(pipe, ALL, catalog=broken_adapter(method))


def test_a_pipeline_that_cannot_be_tracked_is_left_as_it_was() -> None:
    pipe = Stubborn(**tiny.small().components, requires_safety_checker=False)
    with tiny.leaves_no_trace(pipe), pytest.raises(Broken):
        cachekit.apply(pipe, ALL)
    with cachekit.apply(pipe.unet, ALL[1]):
        assert torch.isfinite(tiny.latents(pipe, steps=2)).all()


def test_a_module_that_does_not_give_up_its_class_is_left_as_it_was() -> None:
    pipe = tiny.small()
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2

    class Rigid(type(attention)):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise Broken
            super().__setattr__(name, value)

    attention.__class__ = Rigid
    with tiny.leaves_no_trace(pipe), pytest.raises(Broken):
        cachekit.apply(pipe, ALL)


Adaptive = installed().policies["adaptive_guidance"]
METHODS = {
    Adaptive(threshold=-1, linear=True): ["when.decide", "what.predict", "observe"],
    Adaptive(m=2): ["choices", "where.find", "where.stays", "when.action"],
    FirstBlock(limit=9.0): ["where.find", "when.action", "when.needs", "when.took", "what.predict"],
}
#: Methods that `apply` calls.
EARLY = ("choices", "where.find", "where.stays", "when.action")


def with_broken(policy: Any, method: str) -> Any:
    """Make a policy like this one, with a method of it or of one of its parts that raises."""
    part, _, inner = method.rpartition(".")

    def choices(self: Any) -> dict[str, Any]:
        return {key: choice.with_parts(**{part: broken_part(getattr(choice, part))}) for key, choice in given.items()}

    def broken_part(part: Any) -> Any:
        return type("Bad", (type(part),), {inner: broken, "__module__": __name__})(**dict(part))

    given = policy.choices()
    changed = {"choices": choices} if part else {method: broken}
    return type("Bad", (type(policy),), {**changed, "__module__": __name__})(**dict(policy))


@pytest.mark.parametrize(
    ("policy", "method"), [(policy, method) for policy, methods in METHODS.items() for method in methods]
)
def test_a_policy_that_fails_costs_no_later_image(policy: Any, method: str) -> None:
    pipe = tiny.pixart()
    plain = tiny.latents(pipe, steps=4)
    with cachekit.apply(pipe, policy):
        expected = tiny.latents(pipe, steps=4)
    bad = with_broken(policy, method)
    # The error names the policy, and keeps what was raised; what says nothing of a step is raised as it is.
    if method in EARLY:
        with tiny.leaves_no_trace(pipe), pytest.raises((PolicyError, Broken)) as caught:
            cachekit.apply(pipe, bad)
    else:
        cachekit.apply(pipe, bad)
        with pytest.raises(
            PolicyError, match=rf"^{policy.name}.*{method.rpartition('.')[2]}.* raised Broken"
        ) as caught:
            tiny.latents(pipe, steps=4)
    assert Broken in (type(caught.value), type(caught.value.__cause__))
    cachekit.remove(pipe)
    assert torch.equal(tiny.latents(pipe, steps=4), plain)
    with cachekit.apply(pipe, policy):
        assert torch.equal(tiny.latents(pipe, steps=4), expected)


def test_an_exception_before_the_first_step() -> None:
    pipe = attached()
    with pytest.raises(ValueError, match="prompt"):
        pipe()
    assert torch.equal(tiny.latents(pipe, **AFTER), expected())


def test_a_run_stopped_by_the_pipelines_own_flag() -> None:
    pipe = attached()

    def stop(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return given

    tiny.latents(pipe, steps=STEPS, callback_on_step_end=stop)
    assert pipe.unet._cachekit_attachment.report().steps == 3
    assert torch.equal(tiny.latents(pipe, **AFTER), expected())


@pytest.mark.parametrize("name", MAKERS)
def test_sizes_batches_and_guidance_change_from_run_to_run(name: str) -> None:
    specs = ALL if name != "pixart" else ALL[::2]
    pipe = MAKERS[name]()
    attachment = cachekit.apply(pipe, specs)
    size = 1 if name != "pixart" else pipe.vae_scale_factor
    settings: list[dict[str, Any]] = [
        {"steps": 4, "height": 24 * size, "width": 16 * size},
        {"steps": 3, "guidance": 1.0},
        {"steps": 5, "batch": 1 if name == "svd" else 3},
    ]
    found = [tiny.latents(pipe, **setting) for setting in settings]
    attachment.remove()
    for setting, latents in reversed(list(zip(settings, found))):
        with cachekit.apply(pipe, specs):
            assert torch.equal(tiny.latents(pipe, **setting), latents)


# -- misses -----------------------------------------------------------------------------------------------


def forget(what: Callable[[Any], None], at: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            what(pipe.unet._cachekit_attachment.driver.state.run)
        return given

    return callback


def missed(pipe: Any) -> int:
    return sum(count.missed for count in pipe.unet._cachekit_attachment.report().counts)


def test_what_is_missing_is_computed() -> None:
    """Without its features DeepCache makes the step a full one: latents as with a full step there."""
    pipe = tiny.small()
    with cachekit.apply(pipe, "deepcache:interval=3"):
        found = tiny.latents(pipe, steps=6, callback_on_step_end=forget(lambda run: run.keeper.store.clear(), at=0))
        assert missed(pipe) == 1
    with cachekit.apply(pipe, "deepcache:interval=3,start=1,end=3") as attachment:
        # Full at 0, at 1 where the use starts, reused at 2, full from 3 on.
        assert str(attachment.plan(6)).count("S") >= 1
        partly = tiny.latents(pipe, steps=6)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, partly)


def test_attention_that_is_missing_is_computed() -> None:
    pipe = tiny.small()
    clear = forget(lambda run: run.keeper.store.clear(), at=2)
    with cachekit.apply(pipe, "tgate:m=3"):
        found = tiny.latents(pipe, steps=4, callback_on_step_end=clear)
        assert missed(pipe) == 6
    with cachekit.apply(pipe, "null_text:after=3"):
        assert torch.equal(found, tiny.latents(pipe, steps=4))


@pytest.mark.parametrize(
    "change",
    [
        lambda sample: sample[:, :, :8],
        lambda sample: sample.repeat(2, 1, 1, 1),
        lambda sample: sample[:1].repeat(6, 1, 1, 1),
        lambda sample: sample.double(),
    ],
    ids=["shape", "batch of two", "batch of three", "dtype"],
)
@pytest.mark.parametrize("specs", [ALL[:1], ALL[1:2], ALL[2:]], ids="+".join)
def test_nothing_is_reused_across_shapes_and_dtypes(specs: tuple[str, ...], change: Callable[[Any], Any]) -> None:
    """A loop that changes its latents half way gives what a loop that never cached before would give."""
    unet = tiny.small().unet
    table = torch.arange(900, 0, -100)
    text = torch.cat([tiny.text(1, seed=4), tiny.text(1)])
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)

    @torch.no_grad()
    def call(step: int, sample: torch.Tensor, unet: UNet2DConditionModel = unet) -> torch.Tensor:
        given = text.repeat_interleave(len(sample) // 2, dim=0).to(sample.dtype)
        return unet(sample, table[step], given).sample

    changed = change(sample)
    other = tiny.small().unet.to(changed.dtype)
    fresh = call(4, changed, other)
    with cachekit.apply(unet, specs):
        for step in range(4):
            call(step, sample)
        unet.to(changed.dtype)
        found = call(4, changed)
    assert found.shape == fresh.shape
    assert found.dtype == fresh.dtype
    if specs == ALL[1:2]:
        assert torch.equal(found, fresh)
    assert torch.isfinite(found).all()
