"""Kept keys and values of the text change nothing but the work that is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import NucleusMoEImagePipeline, TextKVCacheConfig
from diffusers.hooks import apply_text_kv_cache
from support import tiny
from support.comparisons import compared

import cachekit
from cachekit.tools.coverage.building import arguments, build

STEPS = 5
MAKERS = {
    "sd": tiny.small,
    "sdxl": tiny.sdxl,
    "pixart": tiny.pixart,
    "wan": tiny.wan,
    "svd": tiny.svd,
    "controlled": tiny.controlled,
}

shared = tiny.sharing(MAKERS)


def missed_and_stored(report: Any) -> tuple[int, int]:
    (count,) = (count for count in report.counts if count.kind == "text_key_value")
    return count.missed, count.stored


@compared("text_kv", "the uncached run", "name")
@pytest.mark.parametrize("name", MAKERS)
def test_the_latents_are_the_uncached_ones_for_fewer_macs(name: str) -> None:
    pipe = shared(name)
    uncached = tiny.latents(pipe, steps=STEPS)
    with cachekit.apply(pipe, "text_kv") as attachment:
        assert torch.equal(tiny.latents(pipe, steps=STEPS), uncached)
        report = attachment.report()
        assert torch.equal(tiny.latents(pipe, steps=STEPS), uncached)
    calls = 2 if name == "wan" else 1
    (count,) = report.counts
    assert (count.stored, count.reused) == (calls * count.targets, calls * (STEPS - 1) * count.targets)
    assert (count.missed, count.computed) == (0, 0)
    assert report.macs < report.baseline_macs
    assert torch.equal(tiny.latents(pipe, steps=STEPS), uncached)


@pytest.mark.parametrize(("name", "batch"), [("sd", 2), ("wan", 1)])
@pytest.mark.parametrize(
    "other",
    [
        "tgate:m=3",
        "adaptive_guidance:m=2",
        "adaptive_guidance:every=2",
        "null_text:before=2",
        "guidance_interval:first=2,stop=4",
        "fora:interval=2",
        "forecast:interval=2",
    ],
)
def test_beside_another_policy_the_latents_are_those_of_it_alone(name: str, other: str, batch: int) -> None:
    """Whichever branches run, and whatever is skipped around the projections."""
    pipe = shared(name)
    if (name, other) in {("wan", "null_text:before=2")}:  # refused: the branch that would run is called second
        with cachekit.apply(pipe, [other, "text_kv"]), pytest.raises(cachekit.GuidanceError, match="is called for"):
            tiny.latents(pipe, steps=STEPS)
        return
    with cachekit.apply(pipe, other):
        alone = tiny.latents(pipe, steps=STEPS, batch=batch)
    with cachekit.apply(pipe, [other, "text_kv"]) as attachment:
        assert torch.equal(tiny.latents(pipe, steps=STEPS, batch=batch), alone)
        report = attachment.report()
    assert {count.policy: count.reused for count in report.counts}["text_kv"] > 0


def test_each_run_has_its_own_text() -> None:
    pipe = shared("sd")
    with cachekit.apply(pipe, "text_kv"):
        tiny.latents(pipe, steps=STEPS)
        other = tiny.latents(pipe, steps=STEPS, prompt_embeds=tiny.text(1, seed=9))
    assert torch.equal(other, tiny.latents(pipe, steps=STEPS, prompt_embeds=tiny.text(1, seed=9)))


def test_projections_alone_are_told_apart_from_what_computes_with_the_image() -> None:
    with pytest.raises(cachekit.SiteError, match="text_kv: looked for text_key_value, but FluxTransformer2DModel has"):
        cachekit.apply(tiny.flux(), "text_kv")


def test_cross_attention_without_a_text_has_no_projections_of_one() -> None:
    """The UNet of AudioLDM has its text in the class embedding, and its cross-attention reads the image."""
    unet = tiny.small(cross_attention_dim=(8, 16)).unet
    with pytest.raises(cachekit.SiteError, match=r"looked for text_key_value, but UNet2DConditionModel has"):
        cachekit.apply(unet, "text_kv")


@compared("text_kv", "the uncached run, as diffusers' own", ["NucleusMoEImagePipeline"])
def test_the_model_that_diffusers_serves() -> None:
    """Its text has keys and values within the attention of the image, and no queries."""
    name = NucleusMoEImagePipeline.__name__

    def drawn(pipe: Any) -> torch.Tensor:
        return pipe(**{**arguments(pipe, name), "output_type": "latent"}).images

    pipe, theirs, ran = build(name), build(name), []
    uncached = drawn(pipe)
    apply_text_kv_cache(theirs.transformer, TextKVCacheConfig())
    drawn_by_theirs = drawn(theirs)
    assert torch.equal(drawn_by_theirs, uncached)
    with cachekit.apply(pipe, "text_kv") as attachment:
        assert torch.equal(drawn(pipe), drawn_by_theirs)
        report = attachment.report()
    (count,) = report.counts
    assert count.reused > 0
    assert count.targets == 2 * len(pipe.transformer.transformer_blocks)
    layer = pipe.transformer.transformer_blocks[0].attn.add_k_proj
    handle = layer.register_forward_hook(lambda *_: ran.append(1))
    drawn(pipe)
    uncached_calls = len(ran)
    with cachekit.apply(pipe, "text_kv"):
        drawn(pipe)
    handle.remove()
    assert 0 < len(ran) - uncached_calls < uncached_calls
