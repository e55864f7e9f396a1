"""Find a transformer's sites and its chains of blocks, by structure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cachekit import Kind, Layout, Site, SiteMap, attends, module_sites

from .streams import streams_of_all, takes_skips

if TYPE_CHECKING:
    from torch import nn

#: Classes whose pipelines put the conditional half of the batch first.
_CONDITIONAL_FIRST = frozenset(
    {
        "AceStepTransformer1DModel",
        "DiTTransformer2DModel",
        "LuminaNextDiT2DModel",
        "OmniGenTransformer2DModel",
        "WuerstchenPrior",
        "ZImageTransformer2DModel",
    }
)
#: Classes whose pipelines call each branch on its own, some of them without naming the call, which structure doesn't
#: show. All of them call the conditional branch first.
_CALLED_APART = frozenset(
    {
        "BriaFibo2Transformer2DModel",
        "ChromaTransformer2DModel",
        "ChronoEditTransformer3DModel",
        "CogView4Transformer2DModel",
        "CosmosTransformer3DModel",
        "FluxTransformer2DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideoTransformer3DModel",
        "JoyImageEditTransformer3DModel",
        "Kandinsky5Transformer3DModel",
        "Krea2Transformer2DModel",
        "LongCatAudioDiTTransformer",
        "Lumina2Transformer2DModel",
        "NucleusMoEImageTransformer2DModel",
        "WanTransformer3DModel",
    }
)
#: Classes whose pipelines negate the output before the scheduler gets it, which structure doesn't show either.
_NEGATED = frozenset(
    {
        "HiDreamImageTransformer2DModel",
        "Lumina2Transformer2DModel",
        "LuminaNextDiT2DModel",
        "NucleusMoEImageTransformer2DModel",
        "ZImageTransformer2DModel",
    }
)


class DiTAdapter:
    """Denoisers with a list of blocks that contain attention, and without up and down blocks."""

    name = "dit"
    summary = "transformers whose blocks hold attention (PixArt, DiT, SD3, Flux and others)"

    def matches(self, denoiser: Any) -> bool:
        """Whether there is a chain of blocks, and no UNet around it."""
        is_unet = hasattr(denoiser, "down_blocks") and hasattr(denoiser, "up_blocks")
        return hasattr(denoiser, "named_children") and not is_unet and any(True for _ in _chains(denoiser))

    def sites(self, denoiser: Any) -> SiteMap:
        """Find attention and feed-forward sites, and the blocks, each of them as a site and in its chain."""
        from cachekit import without_compiler

        lists = {
            tuple(Site(f"{name}.{index}", Kind.BLOCK) for index in range(len(blocks))): [*map(without_compiler, blocks)]
            for name, blocks in _chains(denoiser)
        }
        sites = (*module_sites(denoiser), *(site for chain in lists for site in chain))
        # Where a later block reads the output of an earlier one, a span between them cannot be skipped.
        chains = {chain: streams_of_all(blocks) for chain, blocks in lists.items() if not any(map(takes_skips, blocks))}
        return SiteMap(type(denoiser).__name__, sites, chains=tuple(chains), streams=tuple(chains.values()))

    def layout(self, denoiser: Any) -> Layout:
        """Look up how pipelines call the denoiser's class: the unconditional half first, but for a few classes."""
        name, conditional_first = type(denoiser).__name__, ("cond", "uncond")
        return Layout(
            order=conditional_first if name in _CONDITIONAL_FIRST else Layout.order,
            calls=conditional_first if name in _CALLED_APART else (),
            negated=name in _NEGATED,
        )


def _chains(denoiser: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    from torch import nn

    for name, child in denoiser.named_children():
        if isinstance(child, nn.ModuleList) and any(map(_holds_attention, child)):
            yield name, child


def _holds_attention(block: nn.Module) -> bool:
    return any(attends(module) for module in block.modules())
