"""Places: kinds of sites, regions of a UNet, spans of a transformer's blocks, guidance, the denoiser as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field

from cachekit.errors import SiteError, nearest
from cachekit.interface.parts import Part, Where
from cachekit.interface.sites import (
    DENOISER,
    GUIDANCE,
    LAYERS,
    Kind,
    ModuleKind,
    Region,
    Site,
    SiteMap,
    Target,
    region_of,
)

if TYPE_CHECKING:
    from cachekit.interface.adapter import Layout


#: The words of the kinds that `Sites` finds.
_WORDS = tuple(map(str, get_args(ModuleKind)))


def _as_kinds(value: Any) -> Any:
    """Make a list of kinds; raises `ValueError` for a word that is none of them."""
    words = (value,) if isinstance(value, str) else value
    for word in words if isinstance(words, (tuple, list)) else ():
        if word in (Kind.GUIDANCE, Kind.DENOISER):
            raise ValueError(f"{word} is no kind of site, but a place of its own; write where={word}")
        if isinstance(word, str) and word not in _WORDS:
            raise ValueError(f"unknown kind {word!r}{nearest(word, _WORDS)}; known: {', '.join(_WORDS)}")
    return words


class Sites(Where):
    """All sites of one or several kinds; in a spec the name of a single kind is enough.

    >>> str(Sites(kinds="cross_attention")), str(Sites(kinds=("cross_attention", "feed_forward")))
    ('cross_attention', 'sites(cross_attention;feed_forward)')
    """

    name: ClassVar[str] = "sites"
    summary: ClassVar[str] = "all sites of these kinds; a single kind is written as its own name"
    positional: ClassVar[str] = "kinds"

    kinds: Annotated[tuple[ModuleKind, ...], BeforeValidator(_as_kinds)] = Field(min_length=1)

    @classmethod
    def spellings(cls) -> Mapping[str, Part]:
        """Sites of a single kind, by its name."""
        return {str(kind): cls(kinds=(kind,)) for kind in get_args(ModuleKind)}

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the sites of these kinds; raises `SiteError` where the model has none of them."""
        found = sites.of(*self.kinds)
        if not found:
            looked_for = ", ".join(sorted(map(str, self.kinds)))
            raise SiteError(f"looked for {looked_for}, but {sites.describe()}; use another policy")
        return found

    def __str__(self) -> str:
        """Write a single kind as its own name."""
        kinds = ";".join(map(str, self.kinds))
        return kinds if len(self.kinds) == 1 else f"{self.name}({kinds})"


class WholeDenoiser(Where):
    """The denoiser as a whole: a reuse leaves its call out.

    >>> WholeDenoiser().find(SiteMap("ToyTransformer", ())) == [DENOISER]
    True
    """

    name: ClassVar[str] = "denoiser"
    summary: ClassVar[str] = "the denoiser as a whole: a reuse leaves its call out"

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the denoiser."""
        return [DENOISER]


class Guidance(Where):
    """The guidance of a run: a reuse drops one branch, and the stand-in makes its output.

    `keep` is the branch that runs on. `auto` is the unconditional one, as TGATE publishes it (the conditional one
    where the condition is an image), or the branch called first where each has a call of its own.

    >>> from cachekit import Layout
    >>> Guidance(keep="auto").stays(Layout()), Guidance(keep="auto").stays(Layout(condition="image"))
    ('uncond', 'cond')
    """

    name: ClassVar[str] = "guidance"
    summary: ClassVar[str] = "one branch of guidance, given its other branch"
    positional: ClassVar[str] = "keep"

    keep: Literal["cond", "uncond", "auto"] = "cond"

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the guidance site."""
        return [GUIDANCE]

    def stays(self, layout: Layout) -> str:
        """Name the branch that runs on."""
        if self.keep != "auto":
            return self.keep
        if layout.separate:  # nothing can stand in for a branch before another one has run
            return layout.order[0]
        return "cond" if layout.condition == "image" else "uncond"


class NestedRegion(Where):
    """Everything in a UNet that is deeper than one skip connection, counted from the shallowest, 0.

    >>> nested = tuple(Region(f"region {depth}", f"up.{depth}", (f"down.{depth}", "mid")) for depth in range(3))
    >>> [region.exit for region in NestedRegion(branch=1).find(SiteMap("ToyUNet", (), regions=nested))]
    ['up.1']
    """

    name: ClassVar[str] = "region"
    summary: ClassVar[str] = "all of a UNet that is deeper than one skip connection"
    positional: ClassVar[str] = "branch"

    branch: int = Field(default=0, ge=0)

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the region; raises `SiteError` for a model without skip connections, or with fewer."""
        if not sites.regions:
            cure = "use where=span" if sites.chains else "use a policy for attention or guidance"
            raise SiteError(f"looked for paired down and up blocks, but {sites.describe()}; {cure}")
        if self.branch >= len(sites.regions):
            last = len(sites.regions) - 1
            raise SiteError(f"branch={self.branch}, but {sites.model} has branches 0..{last}; use one of them")
        return [sites.regions[self.branch]]


class Features(Where):
    """What leaves the last block, with all blocks as one; in a UNet what leaves the last up block.

    In a transformer it is the span of all blocks with `chain=all`.

    >>> blocks = tuple(Site(f"blocks.{index}", Kind.BLOCK) for index in range(6))
    >>> [region.name for region in Features().find(SiteMap("ToyTransformer", blocks, chains=(blocks,)))]
    ['blocks.0..blocks.5']
    """

    name: ClassVar[str] = "features"
    summary: ClassVar[str] = "what leaves the last block of a transformer or UNet, all blocks as one"

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the region; raises `SiteError` for a model without blocks in a row."""
        if sites.chains:
            return Span(chain="all").find(sites)
        if not sites.regions:
            raise SiteError(f"looked for blocks in a row, but {sites.describe()}; use where=denoiser")
        names = [site.name for site in sites.of(Kind.BLOCK)]
        name = f"{names[0]}..{names[-1]}"
        return [Region(name, names[-1], tuple(names[:-1]), encoder=sites.regions[0].encoder)]


class Span(Where):
    """Blocks `first` to `stop` - 1 of a transformer's chain of blocks, skipped together.

    `stop` is by default the end of the chain, and `chain`, counted from 0, the longest chain. Negative numbers count
    from the end. `chain=all` takes the blocks of all chains in a row where each chain takes over what the one before
    returns, as in Flux, and else those of each chain. What the blocks add to their input can stand in for them:
    `of=residual`.

    >>> blocks = tuple(Site(f"blocks.{index}", Kind.BLOCK) for index in range(6))
    >>> [region.name for region in Span(first=1, stop=-1).find(SiteMap("ToyTransformer", blocks, chains=(blocks,)))]
    ['blocks.1..blocks.4']
    """

    name: ClassVar[str] = "span"
    summary: ClassVar[str] = "a run of transformer blocks"

    first: int = 0
    stop: int | None = None
    chain: Annotated[int, Field(ge=0)] | Literal["all"] | None = None

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the span; raises `SiteError` for a model without such blocks."""
        if self.chain != "all":
            return [self.region(sites)]
        longest = self.chain_of(sites)
        found = sites.join(self.first, self.stop)
        if not found:
            stop = "the end" if self.stop is None else self.stop - 1
            length = len(sites.joined or sites.chains[longest])
            raise SiteError(
                f"blocks {self.first} to {stop}, but the chains of {sites.model} have blocks 0..{length - 1}; give a"
                " span within them"
            )
        return found

    def region(self, sites: SiteMap) -> Region:
        """Make the region; raises `SiteError` for a model without such blocks."""
        chain = self.chain_of(sites)
        length = len(sites.chains[chain])
        first, stop = (
            end + length if end < 0 else end for end in (self.first, length if self.stop is None else self.stop)
        )
        return sites.span(first, stop, chain)

    def chain_of(self, sites: SiteMap) -> int:
        """Find the number of the chain; raises `SiteError` where there is none."""
        if not sites.chains:
            cure = "where=region" if sites.regions else "a policy for attention or guidance"
            raise SiteError(f"looked for a chain of blocks, but {sites.describe()}; use {cure}")
        if self.chain is None or self.chain == "all":
            return max(range(len(sites.chains)), key=lambda index: len(sites.chains[index]))
        if self.chain >= len(sites.chains):
            last = len(sites.chains) - 1
            raise SiteError(f"chain={self.chain}, but {sites.model} has chains 0..{last}; use one of them")
        return self.chain


class Tail(Where):
    """All blocks of a transformer after the first `m`, with the last of these as the probe of an indicator.

    Of chains that take over from each other, as in Flux, all are meant, and else the longest.

    >>> blocks = tuple(Site(f"blocks.{index}", Kind.BLOCK) for index in range(6))
    >>> (region,) = Tail(m=2).find(SiteMap("ToyTransformer", blocks, chains=(blocks,)))
    >>> region.probe, region.name
    ('blocks.1', 'blocks.2..blocks.5')
    """

    name: ClassVar[str] = "tail"
    summary: ClassVar[str] = "all blocks after the first m, the last of which shows an indicator its change"
    positional: ClassVar[str] = "m"

    m: int = Field(default=1, ge=1)

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the region; raises `SiteError` for a model without so many blocks."""
        blocks, streams = _row_of_blocks(sites)
        if len(blocks) <= self.m:
            raise SiteError(f"m={self.m}, but {sites.model} has {len(blocks)} blocks in a row; give a smaller m")
        return [replace(region_of(blocks[self.m :], streams), probe=blocks[self.m - 1].name)]


class Modulated(Where):
    """All blocks of a transformer, from the first attention of the first block on, whose input an indicator sees.

    What enters there has been normalised and modulated by the timestep. Of chains that take over from each other all
    are meant, and else the longest.

    >>> blocks = tuple(Site(f"blocks.{index}", Kind.BLOCK) for index in range(6))
    >>> attention = Site("blocks.0.attn1", Kind.SELF_ATTENTION)
    >>> (region,) = Modulated().find(SiteMap("ToyTransformer", (attention, *blocks), chains=(blocks,)))
    >>> region.probe, region.exit
    ('blocks.0.attn1', 'blocks.5')
    """

    name: ClassVar[str] = "modulated"
    summary: ClassVar[str] = "all blocks, from the first attention on, which shows an indicator its input"

    def find(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the region; raises `SiteError` for a model without two blocks or an attention in the first."""
        blocks, streams = _row_of_blocks(sites)
        layers = [site for site in sites.of(*LAYERS) if blocks[0].covers(site.name)]
        attentions = [site for site in layers if site.kind is not Kind.FEED_FORWARD]
        if len(blocks) < 2 or not attentions:
            raise SiteError(f"looked for an attention in the first of two blocks, but {sites.describe()}; use tail")
        region = region_of(blocks, streams)
        skipped = (*(site.name for site in layers), *region.skipped[1:])
        return [replace(region, skipped=skipped, probe=attentions[0].name, early=True)]


def _row_of_blocks(sites: SiteMap) -> tuple[Sequence[Site], tuple[str, ...]]:
    """Find the blocks of all chains where they join, else those of the longest chain, and their streams."""
    if sites.joined:
        return sites.joined, sites.streams_of(0)
    longest = Span().chain_of(sites)
    return sites.chains[longest], sites.streams_of(longest)
