"""Name a transformer's sites and its chains of blocks, by structure alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cachekit.adapter import Layout
from cachekit.modules import kind_of, module_sites
from cachekit.sites import Kind, Site, SiteMap

if TYPE_CHECKING:
    from torch import nn

_STREAMS = ("encoder_hidden_states", "hidden_states")


class DiTAdapter:
    """Know every denoiser with a list of blocks that hold attention, and no up and down blocks."""

    name = "dit"
    summary = "transformers whose blocks hold attention (PixArt, DiT, SD3, Flux and others)"

    def matches(self, denoiser: Any) -> bool:
        """Tell whether there is a chain of blocks."""
        is_unet = hasattr(denoiser, "down_blocks") and hasattr(denoiser, "up_blocks")
        return hasattr(denoiser, "named_children") and not is_unet and any(True for _ in _chains(denoiser))

    def sites(self, denoiser: Any) -> SiteMap:
        """Return attention and feed-forward sites, and each block as a site and in its chain."""
        chains = tuple(
            tuple(Site(f"{name}.{index}", Kind.BLOCK) for index in range(len(blocks)))
            for name, blocks in _chains(denoiser)
        )
        streams = tuple(_streams(blocks[0]) for _, blocks in _chains(denoiser))
        blocks = tuple(site for chain in chains for site in chain)
        sites = (*module_sites(denoiser), *blocks)
        return SiteMap(type(denoiser).__name__, sites, chains=chains, streams=streams)

    def layout(self, denoiser: Any) -> Layout:
        """Return the conditional half first for class-conditional DiT, as its pipeline batches it."""
        return Layout(("cond", "uncond")) if type(denoiser).__name__ == "DiTTransformer2DModel" else Layout()


def _chains(denoiser: nn.Module) -> Iterator[tuple[str, Any]]:
    from torch import nn

    for name, child in denoiser.named_children():
        if isinstance(child, nn.ModuleList) and len(child) and _holds_attention(child[0]):
            yield name, child


def _holds_attention(block: nn.Module) -> bool:
    return any(kind_of(module) not in (None, Kind.FEED_FORWARD) for module in block.modules())


def _streams(block: nn.Module) -> tuple[str, ...]:
    """Return the parameters that a block's outputs continue, in the order of its outputs.

    Blocks with joint attention carry two streams; which of them comes first is what diffusers says of the class.
    """
    parameters = inspect.signature(type(block).forward).parameters
    joint = any(kind_of(module) is Kind.JOINT_ATTENTION for module in block.modules())
    streams = _STREAMS if _text_first(block) else _STREAMS[::-1]
    return tuple(name for name in streams if name in parameters and (joint or name == "hidden_states"))


def _text_first(block: nn.Module) -> bool:
    from diffusers.hooks._helpers import TransformerBlockRegistry

    try:
        return bool(TransformerBlockRegistry.get(type(block)).return_hidden_states_index)
    except ValueError:  # a class that diffusers says nothing of
        return True
