"""Find a UNet's sites, and the nested regions that deep-feature caching can skip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cachekit import Kind, Layout, Region, Site, SiteMap, module_sites

#: The modules of a layer of a block, in the order in which they run; the last one present gives its output.
_LAYER_PARTS = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")
#: Classes whose pipelines put the conditional half of the batch first.
_CONDITIONAL_FIRST = frozenset({"StableCascadeUNet", "WuerstchenDiffNeXt"})


class UNetAdapter:
    """Denoisers that are built of `down_blocks`, `mid_block` and `up_blocks`."""

    name = "unet"
    summary = "UNets with paired down and up blocks (SD, SDXL, SVD, AnimateDiff)"

    def matches(self, denoiser: Any) -> bool:
        """Whether both lists of blocks are there."""
        from torch import nn

        return all(isinstance(getattr(denoiser, name, None), nn.ModuleList) for name in ("down_blocks", "up_blocks"))

    def sites(self, denoiser: Any) -> SiteMap:
        """Find attention and feed-forward sites, blocks, and the regions from the shallowest to the deepest."""
        blocks = tuple(Site(name, Kind.BLOCK) for name in _block_names(denoiser))
        regions = tuple(nested_regions(denoiser))
        return SiteMap(type(denoiser).__name__, (*module_sites(denoiser), *blocks), regions)

    def layout(self, denoiser: Any) -> Layout:
        """Look up how pipelines call the denoiser's class: the unconditional half first, but for a few classes.

        Image-to-video UNets have the condition in their sample.
        """
        name = type(denoiser).__name__
        if name in _CONDITIONAL_FIRST:
            return Layout(("cond", "uncond"))
        return Layout(condition="image" if name == "UNetSpatioTemporalConditionModel" else "text")


def nested_regions(denoiser: Any) -> Iterator[Region]:
    """Yield regions 0, 1, 2 ...: each is everything deeper than one skip connection, from the shallowest on.

    Region `B * layers + L` begins after layer L of down block B and ends where up block `-1 - B` takes the skip
    connection of that place: its exit is the input of that up layer. This is the branch numbering of DeepCache
    (arXiv 2312.00858, section 3.3) with the number of layers taken from the model.
    """
    downs, ups = list(denoiser.down_blocks), list(denoiser.up_blocks)
    if len(downs) != len(ups) or not all(_is_plain(block) for block in (*downs, *ups)):
        return
    for depth in range(len(downs)):
        up = len(ups) - 1 - depth
        if len(ups[up].resnets) != len(downs[depth].resnets) + 1:
            return
        for layer in range(len(ups[up].resnets)):
            region = _region(denoiser, depth, layer, up)
            if region is None:
                return
            yield region


def _is_plain(block: Any) -> bool:
    """Whether a block's layers alone carry features: skip convolutions would be a second stream."""
    layers = len(getattr(block, "resnets", None) or ())
    parts = [getattr(block, part) for part in _LAYER_PARTS if getattr(block, part, None) is not None]
    return layers > 0 and not hasattr(block, "skip_conv") and all(len(part) % layers == 0 for part in parts)


def _region(denoiser: Any, depth: int, layer: int, up: int) -> Region | None:
    """Make one region, or None where nothing lies deeper (in a UNet without a middle)."""
    boundary = len(denoiser.up_blocks[up].resnets) - 1 - layer
    deeper_ups = [f"up_blocks.{index}" for index in range(up)]
    inner = _layers(denoiser.up_blocks[up], f"up_blocks.{up}", range(boundary))
    encoder = (*_skipped_downs(denoiser, depth, layer), *_middle(denoiser))
    skipped = (*encoder, *deeper_ups, *inner)
    if not skipped:
        return None
    name = f"region {_number(denoiser, depth, layer)}"
    # FreeU edits what enters the layers of the first two up blocks, T2I-Adapter what leaves the middle, in place.
    return Region(name, skipped[-1], skipped[:-1], edited=up < 2, encoder=encoder)


def _number(denoiser: Any, depth: int, layer: int) -> int:
    ups = list(denoiser.up_blocks)[::-1]
    return sum(len(block.resnets) for block in ups[:depth]) + layer


def _skipped_downs(denoiser: Any, depth: int, layer: int) -> list[str]:
    name, block = f"down_blocks.{depth}", denoiser.down_blocks[depth]
    deeper = [f"down_blocks.{index}" for index in range(depth + 1, len(denoiser.down_blocks))]
    if layer == 0:
        return [name, *deeper]
    rest = _layers(block, name, range(layer, len(block.resnets)))
    samplers = [f"{name}.downsamplers.{i}" for i in range(len(getattr(block, "downsamplers", None) or ()))]
    return [*rest, *samplers, *deeper]


def _layers(block: Any, name: str, layers: range) -> list[str]:
    """List the modules of these layers in the order in which they run; a layer may have several attentions."""
    present = {part: getattr(block, part) for part in _LAYER_PARTS if getattr(block, part, None) is not None}
    each = {part: len(modules) // len(block.resnets) for part, modules in present.items()}
    return [
        f"{name}.{part}.{layer * each[part] + place}"
        for layer in layers
        for part in present
        for place in range(each[part])
    ]


def _middle(denoiser: Any) -> list[str]:
    return ["mid_block"] if getattr(denoiser, "mid_block", None) is not None else []


def _block_names(denoiser: Any) -> list[str]:
    names = [f"down_blocks.{index}" for index in range(len(denoiser.down_blocks))]
    return [*names, *_middle(denoiser), *(f"up_blocks.{index}" for index in range(len(denoiser.up_blocks)))]
