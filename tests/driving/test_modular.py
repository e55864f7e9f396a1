"""Modular pipelines: their guiders say which branch a call is for, and no branch reads what another one kept."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from support import tiny
from support.modular import STEPS, draw, modular

import cachekit
from cachekit.errors import GuidanceError

SCALE = 5.0
MIDDLE = "mid_block.attentions.0.transformer_blocks"


def without_feed_forward(**windows: float) -> SkipLayerGuidance:
    skipped = LayerSkipConfig(indices=[0], fqn=MIDDLE, skip_attention=False, skip_ff=True)
    return SkipLayerGuidance(
        SCALE, skip_layer_config=skipped, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=0.8, **windows
    )


def perturbed() -> PerturbedAttentionGuidance:
    skipped = LayerSkipConfig(indices=[0], fqn=MIDDLE, skip_attention=False, skip_attention_scores=True, skip_ff=False)
    return PerturbedAttentionGuidance(
        SCALE, perturbed_guidance_config=skipped, perturbed_guidance_start=0.0, perturbed_guidance_stop=0.8
    )


def weakened() -> AutoGuidance:
    skipped = LayerSkipConfig(indices=[0], fqn=MIDDLE, skip_attention=False, skip_ff=True)
    return AutoGuidance(SCALE, auto_guidance_config=skipped)


GUIDERS = {
    "two branches": lambda: ClassifierFreeGuidance(SCALE),
    "a late start": lambda: ClassifierFreeGuidance(SCALE, start=0.4),
    "an early stop": lambda: ClassifierFreeGuidance(SCALE, stop=0.6),
    "a weakened branch": weakened,
    "a projected difference": lambda: AdaptiveProjectedGuidance(SCALE),
    "a skipped layer": without_feed_forward,
    "perturbed attention": perturbed,
}
#: The calls in a run of five steps: [cond, uncond, a third].
CALLS = {
    "a late start": [5, 3, 0],
    "an early stop": [5, 3, 0],
    "a skipped layer": [5, 5, 3],
    "perturbed attention": [5, 5, 3],
}


@pytest.mark.parametrize(
    ("specs", "classic"),
    [
        ((), ()),
        (("tgate:m=3",), ("tgate:m=3,keep=cond",)),
        (("deepcache:interval=2",), ("deepcache:interval=2",)),
        (("tgate:m=3", "deepcache:interval=2"), ("tgate:m=3,keep=cond", "deepcache:interval=2")),
        (("adaptive_guidance:m=2",), ("adaptive_guidance:m=2",)),
    ],
)
def test_branches_by_calls_equal_those_of_the_classic_pipeline(
    specs: tuple[str, ...], classic: tuple[str, ...]
) -> None:
    pipe, other = modular(GUIDERS["two branches"]()), tiny.sdxl()
    if specs:
        cachekit.apply(pipe, specs)
        cachekit.apply(other, classic)
    assert torch.allclose(draw(pipe), tiny.latents(other, steps=STEPS), atol=1e-2)


def test_guidance_cut_by_a_policy_equals_that_of_the_guider() -> None:
    pipe, other = modular(GUIDERS["two branches"]()), modular(ClassifierFreeGuidance(SCALE, stop=0.4))
    with cachekit.apply(pipe, "adaptive_guidance:m=2") as attachment:
        assert torch.equal(draw(pipe), draw(other))
        assert [made.dropped for made in attachment.report().record.calls if made.branch == "uncond"] == [0, 0, 1, 1, 1]
        assert attachment.report().arguments["num_inference_steps"] == STEPS


def test_guidance_that_begins_late_is_cut_too() -> None:
    pipe = modular(ClassifierFreeGuidance(SCALE, start=0.2))
    other = modular(ClassifierFreeGuidance(SCALE, start=0.2, stop=0.6))
    with cachekit.apply(pipe, "adaptive_guidance:m=3") as attachment:
        assert torch.equal(draw(pipe), draw(other))
        report = attachment.report()
        assert [made.dropped for made in report.record.calls if made.branch == "uncond"] == [False, False, True, True]
        assert report.record.guided


def test_a_run_without_guidance_is_told_after_a_paused_step() -> None:
    pipe = modular(ClassifierFreeGuidance(1.0))
    with cachekit.apply(pipe, "deepcache:interval=2") as attachment, contextlib.ExitStack() as paused:
        calls = iter(range(5))

        def follow(*_: Any) -> None:
            paused.close()
            if next(calls) == 0:
                paused.enter_context(attachment.paused())

        pipe.unet.register_forward_hook(follow)
        draw(pipe)
        assert not attachment.report().record.guided
        assert attachment.report().steps == 5


def test_a_guider_that_does_not_count_its_calls_is_followed() -> None:
    """Calls have their names, also where another one is made in front of them later."""
    smoothed = SmoothedEnergyGuidanceConfig(indices=[0], fqn=MIDDLE)
    pipe = modular(SmoothedEnergyGuidance(SCALE, seg_guidance_config=smoothed, start=0.4))
    with cachekit.apply(pipe, "deepcache:interval=3") as attachment:
        draw(pipe)
        branches = [made.branch or "cond" for made in attachment.report().record.calls]
    assert branches == ["cond", *["cond", "cond_seg 2"], *["cond", "uncond", "cond_seg 3"] * 3]


@pytest.mark.parametrize("specs", [("tgate:m=3",), ("deepcache:interval=2",), ("tgate:m=3", "deepcache:interval=2")])
@pytest.mark.parametrize("name", GUIDERS)
def test_every_guider_works_and_is_undone(name: str, specs: tuple[str, ...]) -> None:
    pipe = modular(GUIDERS[name]())
    without = draw(pipe)
    with cachekit.apply(pipe, specs) as attachment:
        first = draw(pipe)
        report = attachment.report()
        branches = [made.branch or "cond" for made in report.record.calls]
        cond, uncond = branches.count("cond"), branches.count("uncond")
        assert [cond, uncond, len(branches) - cond - uncond] == CALLS.get(name, [5, 5, 0])
        assert sum(count.missed for count in report.counts) == 0
    assert not torch.allclose(first, without, atol=1e-4)
    assert torch.equal(draw(pipe), without)
    with cachekit.apply(pipe, specs):
        assert torch.equal(draw(pipe), first)


class Replay:
    """Compute everything, and put what the same branch had in its last full step in its place.

    Which branch a call is for is told by its text, and by whether a layer is skipped in it.
    """

    def __init__(self, unet: Any, text: torch.Tensor, interval: int) -> None:
        self.unet, self.text, self.interval = unet, text, interval
        self.step, self.timestep, self.kept = -1, None, {}
        unet.register_forward_pre_hook(self.begin, with_kwargs=True)
        unet.up_blocks[-1].resnets[1].register_forward_hook(self.exchange)

    def begin(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if self.timestep is not args[1] and (self.timestep is None or self.timestep != args[1]):
            self.step, self.timestep = self.step + 1, args[1]
        feed_forward = self.unet.get_submodule(MIDDLE)[0].ff
        is_skipped = bool(getattr(feed_forward, "_diffusers_hook", None) and feed_forward._diffusers_hook.hooks)
        is_cond = torch.equal(kwargs["encoder_hidden_states"], self.text)
        # Without guidance, diffusers gives the call that should skip a layer the other text, and skips nothing.
        self.branch = (is_cond, is_skipped, not is_cond and self.step < 2)

    def exchange(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        if self.step % self.interval == 0 or self.branch not in self.kept:
            self.kept[self.branch] = output.clone()
        return self.kept[self.branch].clone()


def test_branches_that_come_and_go_never_read_each_others() -> None:
    # Step 0 has one branch, step 1 a second, and step 2 another one in its place.
    pipe, other = modular(without_feed_forward(start=0.4)), modular(without_feed_forward(start=0.4))
    replay = Replay(other.unet, tiny.text(1), 3)
    with cachekit.apply(pipe, "deepcache:interval=3"):
        found = draw(pipe)
    assert torch.equal(found, draw(other))
    assert len(replay.kept) == 4


def test_guidance_that_remembers_earlier_steps_is_not_cut() -> None:
    pipe = modular(AdaptiveProjectedGuidance(SCALE, adaptive_projected_guidance_momentum=-0.5))
    without = draw(pipe)
    with cachekit.apply(pipe, "tgate:m=3"), pytest.raises(GuidanceError, match="set its momentum to None"):
        draw(pipe)
    with cachekit.apply(pipe, "deepcache:interval=2"):
        assert not torch.equal(draw(pipe), without)
    assert torch.equal(draw(pipe), without)


def test_a_bare_denoiser_in_a_modular_pipeline_keeps_each_call_apart() -> None:
    pipe = modular(GUIDERS["two branches"]())
    without = draw(pipe)
    with cachekit.apply(pipe, "deepcache:interval=2"):
        wanted = draw(pipe)
    with cachekit.apply(pipe.unet, "deepcache:interval=2"):
        assert torch.equal(draw(pipe), wanted)
    with cachekit.apply(pipe.unet, "tgate:m=3") as attachment:
        # Nobody names the calls there, so no branch is dropped: only the attention of each is gated.
        first = draw(pipe)
        assert {made.dropped for made in attachment.report().record.calls} == {False}
        assert torch.equal(draw(pipe), first)
    assert not torch.equal(first, without)
    assert torch.equal(draw(pipe), without)
