"""Guidance whose branches have a call each, and pipelines with more than one denoiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep
from support import tiny

import cachekit
from cachekit.errors import BudgetError, GuidanceError
from cachekit.tools.coverage.building import arguments, build

STEPS = 6


wan = functools.partial(tiny.wan, layers=2)
wan_transformer = functools.partial(tiny.wan_transformer, layers=2)


def text(seed: int) -> torch.Tensor:
    return tiny.text(1, seed=seed)


def sample(pipe: Any, **changes: Any) -> torch.Tensor:
    given = {"prompt_embeds": text(1), "negative_prompt_embeds": text(2), "num_frames": 1, **changes}
    return tiny.latents(pipe, steps=STEPS, guidance=4.0, **given)


def by_hand(steps: int, predict: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Run the pipeline's loop; `predict(latents, timestep, step)` gives the guided velocity."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    latents = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            latents = scheduler.step(predict(latents, t.expand(1), step), t, latents, return_dict=False)[0]
    return latents


def guided(cond: torch.Tensor, uncond: torch.Tensor, scale: float = 4.0) -> torch.Tensor:
    return uncond + scale * (cond - uncond)


class CrossAttention:
    """Replace the cross-attention outputs of a transformer by given ones, or note them down."""

    def __init__(self, transformer: Any) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        self.instead: dict[str, torch.Tensor] = {}
        for name, module in transformer.named_modules():
            if name.endswith("attn2"):
                module.register_forward_hook(functools.partial(self._hook, name))

    def _hook(self, name: str, module: Any, args: Any, output: torch.Tensor) -> Any:
        self.seen[name] = output
        return self.instead.get(name, output)


# -- a call per branch ------------------------------------------------------------------------------------


def test_the_loop_by_hand_is_the_pipelines() -> None:
    model = wan_transformer(0)

    def predict(latents: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        return guided(*(model(latents, t, text(seed), return_dict=False)[0] for seed in (1, 2)))

    assert torch.equal(sample(wan()), by_hand(STEPS, predict))


@pytest.mark.parametrize("m", [1, 2, 4])
def test_tgate_keeps_the_mean_of_two_calls(m: int) -> None:
    model = wan_transformer(0)
    attention = CrossAttention(model)

    def predict(latents: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        cond = model(latents, t, text(1), return_dict=False)[0]
        if step >= m:
            return cond
        of_cond = dict(attention.seen)
        uncond = model(latents, t, text(2), return_dict=False)[0]
        if step == m - 1:
            attention.instead = {name: (of_cond[name] + kept) / 2 for name, kept in attention.seen.items()}
        return guided(cond, uncond)

    pipe = wan()
    without = sample(pipe)
    with cachekit.apply(pipe, f"tgate:m={m}") as attachment:
        found = sample(pipe)
        assert torch.equal(found, by_hand(STEPS, predict))
        assert torch.equal(sample(pipe), found)
        (cross,) = (count for count in attachment.report().counts if count.kind == "cross_attention")
        assert (cross.computed, cross.stored, cross.reused, cross.missed) == (4 * (m - 1), 4, 2 * (STEPS - m), 0)
        assert sum(call.dropped for call in attachment.report().record.calls) == STEPS - m
    assert not torch.equal(found, without)
    assert torch.equal(sample(pipe), without)


@pytest.mark.parametrize("linear", [False, True])
def test_guidance_ends_between_two_calls(linear: bool) -> None:
    model, kept = wan_transformer(0), []

    def predict(latents: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        cond = model(latents, t, text(1), return_dict=False)[0]
        if step >= 3:
            return guided(cond, cond - kept[-1]) if linear else cond
        uncond = model(latents, t, text(2), return_dict=False)[0]
        kept.append(cond - uncond)
        return guided(cond, uncond)

    pipe = wan()
    with cachekit.apply(pipe, f"adaptive_guidance:m=3,linear={str(linear).lower()}"):
        assert torch.equal(sample(pipe), by_hand(STEPS, predict))


def test_gamma_compares_two_calls() -> None:
    model, gammas = wan_transformer(0), []

    def predict(latents: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        cond, uncond = (model(latents, t, text(seed), return_dict=False)[0] for seed in (1, 2))
        gammas.append(float(torch.cosine_similarity(cond.flatten(1), uncond.flatten(1)).min()))
        return guided(cond, uncond)

    by_hand(STEPS, predict)
    pipe = wan()
    with cachekit.apply(pipe, "adaptive_guidance:threshold=1.0") as attachment:
        sample(pipe)
        trace = attachment.report().traces["adaptive_guidance"]
    assert [step for step, _ in trace] == list(range(STEPS))
    assert [gamma for _, gamma in trace] == gammas


def test_a_policy_that_keeps_the_second_branch_is_refused() -> None:
    pipe = wan()
    without = sample(pipe)
    for spec in ("null_text:after=3", "tgate:m=2,keep=uncond"):
        with cachekit.apply(pipe, spec), pytest.raises(GuidanceError, match=f"{spec}.*called for 'cond' first"):
            sample(pipe)
        assert torch.equal(sample(pipe), without)


def test_without_guidance_there_is_one_branch() -> None:
    pipe = wan()
    plain = sample(pipe, guidance_scale=1.0)
    with cachekit.apply(pipe, "null_text:after=3") as attachment:
        assert torch.equal(sample(pipe, guidance_scale=1.0), plain)
        assert attachment.report().warnings == ["null_text:after=3 never fired in this run of 6 unguided steps"]
    with cachekit.apply(pipe, ["tgate:m=2", "adaptive_guidance:m=1"]) as attachment:
        assert not torch.equal(sample(pipe, guidance_scale=1.0), plain)
        report = attachment.report()
        assert not report.record.guided
        assert "adaptive_guidance:m=1 never fired in this run of 6 unguided steps" in report.warnings


def test_costs_of_calls_that_did_not_run() -> None:
    pipe = wan()
    with cachekit.apply(pipe, "adaptive_guidance:m=3") as attachment:
        sample(pipe)
        cost = attachment.report().cost
    assert cost.macs * 4 == cost.baseline_macs * 3
    assert cost.per_call.count(0) == 3


def test_a_bare_loop_may_name_its_calls() -> None:
    model = wan_transformer(0)

    def predict(latents: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        outputs = []
        for name, seed in (("cond", 1), ("uncond", 2)):
            with model.cache_context(name):
                outputs.append(model(latents, t, text(seed), return_dict=False)[0])
        return guided(*outputs)

    pipe = wan()
    with cachekit.apply(pipe, "tgate:m=3"):
        expected = sample(pipe)
    with cachekit.apply(model, "tgate:m=3"):
        assert "cache_context" in vars(model)
        assert torch.equal(by_hand(STEPS, predict), expected)
    assert "cache_context" not in vars(model)


def flux_latents(pipe: Any, **changes: Any) -> torch.Tensor:
    negative = {"negative_prompt_embeds": text(2), "negative_pooled_prompt_embeds": text(4)[:, 0]}
    return tiny.latents(pipe, steps=STEPS, **negative, **changes)


def test_true_guidance_beside_an_embedded_one() -> None:
    pipe = tiny.flux(layers=(1, 1), guidance_embeds=True)
    distilled, true = flux_latents(pipe), flux_latents(pipe, true_cfg_scale=3.0)
    with cachekit.apply(pipe, "adaptive_guidance:m=3") as attachment:
        assert torch.equal(flux_latents(pipe), distilled)
        assert not attachment.report().record.guided
        assert not torch.equal(flux_latents(pipe, true_cfg_scale=3.0), true)
        assert attachment.report().record.guided
        assert [len(row.branches) for row in attachment.report().record.rows] == [2, 2, 2, 1, 1, 1]
    assert torch.equal(flux_latents(pipe, true_cfg_scale=3.0), true)


class Echo:
    """From some call on, answer each second call of a denoiser with the output of the one before it."""

    def __init__(self, denoiser: Any, start: int) -> None:
        self.inner, self.start, self.calls = denoiser.forward, start, 0
        denoiser.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls <= self.start or self.calls % 2:
            self.output = self.inner(*args, **kwargs)
        return self.output


@pytest.mark.parametrize("name", ["Lumina2Pipeline", "FluxImg2ImgPipeline", "Kandinsky5T2VPipeline", "ChromaPipeline"])
def test_calls_without_names_come_in_the_known_order(name: str) -> None:
    def drawn(pipe: Any) -> torch.Tensor:
        return torch.as_tensor(first_of(pipe(**arguments(pipe, name))))

    pipe, other = build(name), build(name)
    without = drawn(pipe)
    with cachekit.apply(pipe, "adaptive_guidance:m=3") as attachment:
        found = drawn(pipe)
        report = attachment.report()
        assert [len(row.branches) for row in report.record.rows] == [2] * 3 + [1] * (report.steps - 3)
        # What reads values cannot be counted on shapes alone, and says so.
        assert ("MACs unknown: Lumina2Transformer2DModel" in str(report)) == (name == "Lumina2Pipeline")
    Echo(other.transformer, 6)
    assert torch.equal(found, drawn(other))
    assert not torch.equal(found, without)
    assert torch.equal(drawn(pipe), without)


def modular_wan(**guiders: Any) -> Any:
    """Build Wan 2.2's modular pipeline from embeddings to latents, with the classic one's components."""
    source, pipe = wan(boundary=0.8), Wan22CoreDenoiseStep().init_pipeline()
    parts = {name: getattr(source, name) for name in ("transformer", "transformer_2", "scheduler")}
    pipe.update_components(**parts, **guiders, boundary_ratio=0.8)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("spec", [None, "tgate:m=2", "tgate:m=5", "adaptive_guidance:m=3", "delta_dit:interval=2"])
def test_two_guiders_are_followed_as_the_classic_pipeline_is(spec: str | None) -> None:
    pipe = modular_wan(guider=ClassifierFreeGuidance(4.0), guider_2=ClassifierFreeGuidance(4.0))
    other = wan(boundary=0.8)
    if spec:
        cachekit.apply(pipe, spec)
        cachekit.apply(other, spec)
    noise = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    given = {"prompt_embeds": text(1), "negative_prompt_embeds": text(2), "latents": noise, "num_frames": 1}
    found = pipe(**given, height=32, width=32, num_inference_steps=STEPS, output="latents")
    assert torch.equal(found, sample(other))


def test_the_cost_of_one_branch_that_was_to_be_two() -> None:
    """A run that is told apart as unguided by its second step has begun as a guided one."""
    pipe = build("FluxPipeline")
    with cachekit.apply(pipe, "adaptive_guidance:m=1,linear=true") as attachment:
        pipe(**arguments(pipe, "FluxPipeline") | {"true_cfg_scale": 1.0})
        report = attachment.report()
    assert not report.record.guided
    assert report.macs == report.baseline_macs > 0


def with_last_difference(denoiser: Any, m: int) -> None:
    """From call m on, run the conditional half and subtract what the branches of the last whole call differed by."""
    whole, calls, last = denoiser.forward, 0, ()

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls, last
        calls += 1
        if calls <= m:
            outputs = tuple(whole(*args, **kwargs))
            last = [torch.sub(*output.chunk(2)[::-1]) for output in outputs]
            return outputs
        cond = whole(*tiny.cut(args, 1), **tiny.cut(kwargs, 1))
        return tuple(torch.cat([output - difference, output]) for output, difference in zip(cond, last))

    denoiser.forward = forward


def test_the_last_difference_is_that_of_each_output() -> None:
    """Video and sound, each of its own shape; what a rehearsal foresees is what is kept."""
    name, spec = "LTX2HDRPipeline", "adaptive_guidance:m=3,linear=true"

    def drawn(pipe: Any) -> torch.Tensor:
        return torch.as_tensor(first_of(pipe(**arguments(pipe, name))))

    pipe, other = build(name), build(name)
    plain = drawn(pipe)
    with cachekit.apply(pipe, spec) as attachment:
        found = drawn(pipe)
        kept = attachment.report().record.peak_bytes
    with_last_difference(other.transformer, 3)
    assert torch.equal(found, drawn(other))
    assert not torch.equal(found, plain)
    assert torch.equal(drawn(pipe), plain)
    with cachekit.apply(pipe, spec, max_cache_bytes=kept):
        assert torch.equal(drawn(pipe), found)
    with (
        cachekit.apply(pipe, spec, max_cache_bytes=kept - 1),
        pytest.raises(BudgetError, match=f"needs {kept:,} bytes"),
    ):
        drawn(pipe)


def first_of(value: Any) -> Any:
    """Find the array within a pipeline's output."""
    while isinstance(value, (tuple, list, dict)):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    return value


# -- two denoisers ----------------------------------------------------------------------------------------


@contextmanager
def calls_of(**modules: Any) -> Iterator[list[str]]:
    seen: list[str] = []
    handles = [
        module.patch_embedding.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, module in modules.items()
    ]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("m", [2, 5])
def test_two_denoisers_share_the_steps_of_one_loop(m: int) -> None:
    pipe = wan(boundary=0.8)
    with calls_of(high=pipe.transformer, low=pipe.transformer_2) as seen:
        without = sample(pipe)
    first = seen.count("high") // 2
    assert 2 < first < STEPS - 1, seen
    with (
        cachekit.apply(pipe, f"tgate:m={m}") as attachment,
        calls_of(high=pipe.transformer, low=pipe.transformer_2) as seen,
    ):
        found = sample(pipe)
        counted = list(seen)
        assert torch.equal(sample(pipe), found)
        report = attachment.report()
        assert report.steps == STEPS
    branches = [2 if step < m else 1 for step in range(STEPS)]
    expected = [name for step, count in enumerate(branches) for name in ["high" if step < first else "low"] * count]
    assert counted == expected
    (cross,) = (count for count in report.counts if count.kind == "cross_attention")
    # The second one keeps at the gate, or where it begins after it.
    assert cross.stored == (2 * 2 + 2 if m <= first else 2 * 2)
    assert cross.missed == 0
    assert cross.reused == 2 * (STEPS - m - (m <= first))
    assert report.cost.baseline_macs > report.cost.macs
    assert not torch.equal(found, without)
    assert torch.equal(sample(pipe), without)
    assert type(pipe.transformer_2) is WanTransformer3DModel
    assert not any("forward" in vars(module) for module in pipe.transformer_2.modules())


def test_two_denoisers_share_the_guidance_of_one_loop() -> None:
    """It is planned, counted and reported once, not for each denoiser."""
    pipe = wan(boundary=0.8)
    with cachekit.apply(pipe, "tgate:m=3") as attachment:
        sample(pipe)
        plan, report = attachment.plan(STEPS), attachment.report()
    assert [marks for _, _, kind, marks in plan.columns() if kind == "guidance"] == ["..." + "r" * (STEPS - 3)]
    assert str(plan).count("guidance x 1") == 1
    (count,) = (count for count in report.counts if count.kind == "guidance")
    assert (count.targets, count.computed, count.reused) == (1, 3, STEPS - 3)


def test_a_policy_may_act_on_one_of_two_denoisers() -> None:
    pipe = wan(boundary=0.8)
    with pytest.raises(cachekit.CachekitError, match="deepcache"):
        cachekit.apply(pipe, "deepcache")
    assert "_cachekit_attachment" not in vars(pipe.transformer)


def test_a_prior_and_a_decoder_have_a_run_each() -> None:
    name = "StableCascadeCombinedPipeline"
    pipe = build(name)

    def drawn() -> torch.Tensor:
        return torch.as_tensor(first_of(pipe(**arguments(pipe, name))))

    without = drawn()
    with cachekit.apply(pipe, "adaptive_guidance:m=2") as attachment:
        found = drawn()
        report = attachment.report()
        assert [len(earlier.record.rows) > 0 for earlier in report.earlier] == [True]
        assert {call.denoiser for call in report.earlier[0].record.calls} == {"prior_prior"}
        assert {call.denoiser for call in report.record.calls} == {"decoder"}
        # The decoder is not guided by default, but the policy did fire in this call.
        assert report.earlier[0].record.guided
        assert not report.warnings
        assert torch.equal(drawn(), found)
    assert not torch.equal(found, without)
    assert torch.equal(drawn(), without)
