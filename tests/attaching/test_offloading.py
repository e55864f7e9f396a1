"""Offloaded weights, and weights stored in another dtype, change no cached image.

diffusers needs an accelerator for sequential offloading, so accelerate's hooks are set directly for that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import HookRegistry, apply_group_offloading
from support import tiny

import cachekit

#: Every block has what offloading moves.
small = functools.partial(tiny.small, layers_per_block=1)
CPU, STEPS = torch.device("cpu"), 4
TGATE, DEEPCACHE = "tgate:m=2", "deepcache:interval=2"
BOTH = (TGATE, DEEPCACHE)
FORECAST = "forecast:interval=2"
#: Policies, and whether offloading is set up before they are applied.
ORDERS = [((FORECAST,), True), ((FORECAST, DEEPCACHE), False)]
ORDERS += [((TGATE,), True), ((DEEPCACHE,), False), (BOTH, True), (BOTH, False)]


def sequential(pipe: Any, folder: Path) -> None:
    for model in (pipe.unet, pipe.vae):
        cpu_offload(model, CPU)


def whole_models(pipe: Any, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def groups(pipe: Any, **given: Any) -> None:
    apply_group_offloading(pipe.unet, onload_device=CPU, offload_device=CPU, **given)


def blocks(pipe: Any, folder: Path) -> None:
    """Offload each block to a file: its weights are undefined while it does not run."""
    groups(pipe, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder))


def pairs(pipe: Any, folder: Path) -> None:
    """Offload blocks in pairs: the first loads the weights of both, even if it is skipped itself."""
    groups(pipe, offload_type="block_level", num_blocks_per_group=2, offload_to_disk_path=str(folder))


def leaves(pipe: Any, folder: Path) -> None:
    groups(pipe, offload_type="leaf_level")


FEATURES: dict[str, Callable[[Any, Path], None]] = {
    "sequential": sequential,
    "whole models": whole_models,
    "blocks": blocks,
    "pairs": pairs,
    "leaves": leaves,
}


def draw(pipe: Any, **given: Any) -> torch.Tensor:
    return tiny.latents(pipe, steps=STEPS, **given)


@functools.cache
def wanted(specs: tuple[str, ...]) -> tuple[torch.Tensor, list[Any], Any]:
    """The image, the counts and the cost without offloading."""
    pipe = small()
    with cachekit.apply(pipe, specs) as attachment:
        return draw(pipe), attachment.report().counts, attachment.report().cost


@functools.cache
def plain() -> torch.Tensor:
    return draw(small())


def is_alike(found: torch.Tensor, other: torch.Tensor, name: str) -> bool:
    # Weights from a file lie elsewhere in memory: half a batch may be multiplied in another order.
    return torch.allclose(found, other, atol=1e-4) if name in ("blocks", "pairs") else torch.equal(found, other)


@pytest.mark.parametrize(("specs", "before_apply"), ORDERS)
@pytest.mark.parametrize("name", FEATURES)
def test_offloaded_weights_give_the_same_cached_image(
    name: str, specs: tuple[str, ...], before_apply: bool, tmp_path: Path
) -> None:
    pipe = small()
    image, counts, cost = wanted(specs)
    if before_apply:
        FEATURES[name](pipe, tmp_path)
    with cachekit.apply(pipe, specs) as attachment:
        if not before_apply:
            FEATURES[name](pipe, tmp_path)
        first = draw(pipe)
        report = attachment.report()
        assert is_alike(first, image, name)
        assert report.counts == counts
        assert specs != BOTH or report.cost == cost
        assert torch.equal(draw(pipe), first)
    assert not torch.allclose(first, plain(), atol=1e-3)
    assert torch.equal(draw(pipe), plain())
    with cachekit.apply(pipe, specs):
        assert torch.equal(draw(pipe), first)
    if name == "sequential":
        assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["sequential", "whole models", "leaves"])
def test_offloading_ends_while_policies_are_applied(name: str, tmp_path: Path) -> None:
    pipe = small()
    FEATURES[name](pipe, tmp_path)
    with cachekit.apply(pipe, BOTH):
        assert torch.equal(draw(pipe), wanted(BOTH)[0])
        if name == "leaves":
            HookRegistry.check_if_exists_or_initialize(pipe.unet).remove_hook("group_offloading", recurse=True)
        else:
            pipe.remove_all_hooks()
        assert torch.equal(draw(pipe), wanted(BOTH)[0])
    assert torch.equal(draw(pipe), plain())


def test_a_skipped_module_does_not_fetch_its_weights() -> None:
    pipe = small()
    leaves(pipe, Path())
    fetched = []
    group = pipe.unet.mid_block.resnets[0].conv1._diffusers_hook.get_hook("group_offloading").group
    onload, group.onload_ = group.onload_, lambda: (fetched.append(True), onload())
    with cachekit.apply(pipe, DEEPCACHE):
        draw(pipe)
    assert len(fetched) == STEPS / 2


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(("specs", "before_apply"), [(BOTH, True), (BOTH, False), ((TGATE,), False)])
def test_weights_stored_in_another_dtype(specs: tuple[str, ...], before_apply: bool, storage: torch.dtype) -> None:
    pipe, other = small(), small()
    for cast in (pipe, other) if before_apply else (other,):
        cast.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    without = draw(other)
    with cachekit.apply(pipe, specs) as attachment:
        if not before_apply:
            pipe.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        first = draw(pipe)
        assert (attachment.report().counts, attachment.report().cost) == wanted(specs)[1:]
    assert not torch.allclose(first, without, atol=1e-3)
    assert not torch.equal(without, plain())
    assert torch.equal(draw(pipe), without)
    with cachekit.apply(pipe, specs):
        assert torch.equal(draw(pipe), first)


@pytest.mark.parametrize("feature", ["tiling", "slicing"])
def test_the_vae_decodes_as_it_likes(feature: str) -> None:
    pipe = small()
    given = {"batch": 2, "output_type": "pt"}
    with cachekit.apply(pipe, BOTH):
        cached = draw(pipe, **{**given, "output_type": "latent"})
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 16, 8
        getattr(pipe.vae, f"enable_{feature}")()
        found = draw(pipe, **given)
    with torch.no_grad():
        decoded = pipe.vae.decode(cached / pipe.vae.config.scaling_factor, return_dict=False)[0]
    assert torch.equal(found, (decoded / 2 + 0.5).clamp(0, 1))
    getattr(pipe.vae, f"disable_{feature}")()
    assert torch.equal(draw(pipe), plain())
