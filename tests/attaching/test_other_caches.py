"""diffusers' own caches are refused with the cure, and its other hooks find a block whatever stands before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_first_block_cache, apply_layer_skip
from support import tiny

import cachekit
from cachekit.errors import AttachmentError

TGATE = "tgate:m=2"
CACHES: dict[str, Callable[[Any], Any]] = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=0.1),
    "TaylorSeerCache": lambda pipe: TaylorSeerCacheConfig(cache_interval=2),
    "MagCache": lambda pipe: MagCacheConfig(num_inference_steps=3, mag_ratios=torch.ones(3)),
    "PyramidAttentionBroadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "FasterCache": lambda pipe: FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


def draw(pipe: Any) -> torch.Tensor:
    return tiny.latents(pipe, steps=3, num_frames=1)


@pytest.mark.parametrize("name", CACHES)
def test_an_enabled_cache_is_refused_with_the_cure(name: str) -> None:
    pipe = tiny.wan(layers=2)
    without = draw(pipe)
    refusal = rf"WanTransformer3DModel: .* \({name}\) is enabled; call pipe.transformer.disable_cache\(\) first"
    pipe.transformer.enable_cache(CACHES[name](pipe))
    with tiny.leaves_no_trace(pipe), pytest.raises(AttachmentError, match=refusal):
        cachekit.apply(pipe, TGATE)
    pipe.transformer.disable_cache()
    with cachekit.apply(pipe, TGATE):
        first = draw(pipe)
        pipe.transformer.enable_cache(CACHES[name](pipe))
        with pytest.raises(AttachmentError, match=refusal):
            draw(pipe)
        pipe.transformer.disable_cache()
        assert torch.equal(draw(pipe), first)
    assert not torch.allclose(first, without, atol=1e-4)
    assert torch.equal(draw(pipe), without)


@pytest.mark.parametrize("spec", [TGATE, "delta_dit:interval=2,blocks=1"])
def test_a_cache_set_up_behind_the_models_back_is_noticed(spec: str) -> None:
    pipe = tiny.wan(layers=2)
    without = draw(pipe)
    attachment = cachekit.apply(pipe, spec)
    first = draw(pipe)
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    refusal = r"set up without enable_cache; call remove_hook\('fbc_block_hook'\) and remove_hook\('fbc_leader_block"
    with pytest.raises(AttachmentError, match=refusal):
        draw(pipe)
    attachment.remove()
    with tiny.leaves_no_trace(pipe), pytest.raises(AttachmentError, match=refusal):
        cachekit.apply(pipe, spec)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    for hook in ("fbc_block_hook", "fbc_leader_block_hook"):
        registry.remove_hook(hook, recurse=True)
    assert torch.equal(draw(pipe), without)
    with cachekit.apply(pipe, spec):
        assert torch.equal(draw(pipe), first)


@pytest.mark.parametrize("before_apply", [True, False])
def test_blocks_are_skipped_by_diffusers_own_hooks_beside_a_block_policy(before_apply: bool) -> None:
    skipped = LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    pipe, spec = tiny.pixart(), "delta_dit:interval=2,blocks=1"
    apply_layer_skip(pipe.transformer, skipped)
    without = tiny.latents(pipe, steps=4)
    with cachekit.apply(pipe, spec):
        wanted = tiny.latents(pipe, steps=4)
    other = tiny.pixart()
    if before_apply:
        apply_layer_skip(other.transformer, skipped)
    with cachekit.apply(other, spec):
        if not before_apply:
            apply_layer_skip(other.transformer, skipped)
        assert torch.equal(tiny.latents(other, steps=4), wanted)
    assert torch.equal(tiny.latents(other, steps=4), without)
    assert not torch.allclose(wanted, without, atol=1e-3)
