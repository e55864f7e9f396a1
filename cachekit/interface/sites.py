"""Where a policy can act in a denoiser: sites, regions, and the map of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, Union

from cachekit.errors import SiteError, nearest

#: Names of guidance branches, in the order in which the denoiser receives them: `("uncond", "cond")`.
Branches = tuple[str, ...]


class Kind(str, Enum):
    """The role of a site. Policies ask for kinds and never see module classes.

    `CROSS_ATTENTION` reads another sequence (the text), `SELF_ATTENTION` its own; in `JOINT_ATTENTION` image and
    text attend to each other. `TEMPORAL_ATTENTION` is the self-attention over a video's frames. `TEXT_KEY_VALUE` are
    the projections of the text to keys and values inside cross-attention, the same in all steps while the text is.
    `FEED_FORWARD` is the MLP beside an attention, `BLOCK` a whole block of layers or a region of several.
    `GUIDANCE` is not a module but the choice of the guidance branches that run. `DENOISER` is the call of the denoiser
    as a whole, with everything inside.

    >>> Kind("cross_attention")
    <Kind.CROSS_ATTENTION: 'cross_attention'>
    >>> str(Kind.BLOCK)
    'block'
    """

    CROSS_ATTENTION = "cross_attention"
    SELF_ATTENTION = "self_attention"
    JOINT_ATTENTION = "joint_attention"
    TEMPORAL_ATTENTION = "temporal_attention"
    TEXT_KEY_VALUE = "text_key_value"
    FEED_FORWARD = "feed_forward"
    BLOCK = "block"
    GUIDANCE = "guidance"
    DENOISER = "denoiser"

    def __str__(self) -> str:
        """Spell the kind as reports and errors do."""
        return self.value


def kind_of(word: str) -> Kind:
    """Find the kind with this word; raises `ValueError` where there is none.

    >>> kind_of("feed_forward")
    <Kind.FEED_FORWARD: 'feed_forward'>
    """
    if word not in list(Kind):
        words = list(map(str, Kind))
        raise ValueError(f"unknown kind {word!r}{nearest(str(word), words)}; known: {', '.join(words)}")
    return Kind(word)


#: The kinds of sites that are modules; guidance and the denoiser are places of their own. Type checkers see all kinds,
#: since a list of kinds is seldom a list of literals.
if TYPE_CHECKING:
    ModuleKind = Kind
else:
    ModuleKind = Literal[
        Kind.CROSS_ATTENTION,
        Kind.SELF_ATTENTION,
        Kind.JOINT_ATTENTION,
        Kind.TEMPORAL_ATTENTION,
        Kind.TEXT_KEY_VALUE,
        Kind.FEED_FORWARD,
        Kind.BLOCK,
    ]


#: The kinds of layers that do the work in a block: attention and feed-forward.
LAYERS = (
    Kind.SELF_ATTENTION,
    Kind.CROSS_ATTENTION,
    Kind.JOINT_ATTENTION,
    Kind.TEMPORAL_ATTENTION,
    Kind.FEED_FORWARD,
)


@dataclass(frozen=True)
class Site:
    """One module of the denoiser: its qualified name, as in `named_modules`, and its kind.

    `resizes` is set where its output is wider or narrower than its input, so that no residual exists.

    >>> block = Site("down_blocks.1", Kind.BLOCK)
    >>> block.covers("down_blocks.1.resnets.0"), block.covers("down_blocks.10")
    (True, False)
    """

    name: str
    kind: Kind
    resizes: bool = False

    def __post_init__(self) -> None:
        """Take the word of a kind for the kind; raises `ValueError` where it is unknown."""
        if not isinstance(self.kind, Kind):
            object.__setattr__(self, "kind", kind_of(self.kind))

    @property
    def exit(self) -> str:
        """The module whose output is kept: the site itself."""
        return self.name

    def covers(self, name: str) -> bool:
        """Whether module `name` is the site or lies inside it, and so doesn't run on a step that reuses the site."""
        return _is_inside(name, self.name)


@dataclass(frozen=True)
class Region:
    """A run of consecutive modules that is skipped as a whole.

    `exit` is the module whose output is kept, `skipped` are the other modules of the region, in the order in which
    they run.

    `entry` is the module whose inputs enter the region. `streams` are the names of those inputs among the parameters
    of its forward, in the order of the exit's output tensors. Both are empty where entry and exit differ in shape,
    so that no residual exists.

    `probe` is a module that shows an `Indicator` what enters and leaves it, in each call. It runs before the region and
    lies outside it; with `early`, only what enters is shown, and the probe may be the first of the skipped modules.

    `edited` is set where later code may write into the exit's tensor in place, so that what is kept must be a copy.
    `encoder` are the skipped modules that a ControlNet has a copy of. The ControlNet's residuals are added to their
    outputs alone, so a call that skips them can skip the copies too.

    >>> region = Region("blocks.1..blocks.3", exit="blocks.3", skipped=("blocks.1", "blocks.2"))
    >>> region.covers("blocks.2.attn1"), region.covers("blocks.0")
    (True, False)
    """

    name: str
    exit: str
    skipped: tuple[str, ...]
    entry: str = ""
    streams: tuple[str, ...] = ()
    probe: str = ""
    early: bool = False
    edited: bool = False
    encoder: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """`Kind.BLOCK`: a region composes with other policies as a block does."""
        return Kind.BLOCK

    def covers(self, name: str) -> bool:
        """Whether module `name` lies inside the region, and so doesn't run on a step that reuses it."""
        return any(_is_inside(name, module) for module in (self.exit, *self.skipped))


#: What a policy acts on.
Target = Union[Site, Region]

#: The choice of the guidance branches that run: one site for all denoisers of a pipeline.
GUIDANCE = Site("guidance", Kind.GUIDANCE)
#: The call of a denoiser as a whole.
DENOISER = Site("denoiser", Kind.DENOISER)


@dataclass(frozen=True)
class SiteMap:
    """Where policies can act in one denoiser, as its adapter found it.

    `model` is the name of the denoiser's class, for errors. `sites` are in the order of `named_modules`. `regions`
    are those that the adapter names, such as the nested regions of a UNet from the shallowest to the deepest.
    `chains` are lists of consecutive blocks, as in a transformer: `span` makes a region of some of them. `streams`
    holds, for each chain, the parameters that its blocks read and return (see `Region.streams`), or `()` where
    they are unknown.

    >>> blocks = tuple(Site(f"blocks.{index}", Kind.BLOCK) for index in range(4))
    >>> attention = Site("blocks.0.attn1", Kind.SELF_ATTENTION)
    >>> sites = SiteMap("ToyTransformer", (attention, *blocks), chains=(blocks,), streams=(("hidden_states",),))
    >>> [site.name for site in sites.of(Kind.SELF_ATTENTION, Kind.GUIDANCE)]
    ['guidance', 'blocks.0.attn1']
    >>> sites.describe()
    'ToyTransformer has block x 4, self_attention x 1'
    """

    model: str
    sites: tuple[Site, ...]
    regions: tuple[Region, ...] = ()
    chains: tuple[tuple[Site, ...], ...] = ()
    streams: tuple[tuple[str, ...], ...] = ()

    def of(self, *kinds: Kind) -> tuple[Site, ...]:
        """Find the sites of these kinds; the one guidance site comes first, then the one of the denoiser.

        Raises `ValueError` for a word that is no kind.
        """
        wanted = set(map(kind_of, kinds))
        return tuple(site for site in (GUIDANCE, DENOISER, *self.sites) if site.kind in wanted)

    def span(self, first: int, stop: int, chain: int = 0) -> Region:
        """Make a region of the blocks `first` to `stop - 1` of a chain; all three count from 0.

        >>> blocks = tuple(Site(f"blocks.{index}", Kind.BLOCK) for index in range(4))
        >>> sites = SiteMap("ToyTransformer", blocks, chains=(blocks,), streams=(("hidden_states",),))
        >>> region = sites.span(1, 4)
        >>> region.name, region.entry, region.exit
        ('blocks.1..blocks.3', 'blocks.1', 'blocks.3')
        >>> region.skipped, region.streams
        (('blocks.1', 'blocks.2'), ('hidden_states',))

        Raises `IndexError` for a chain that does not exist, and `SiteError` for a span that isn't within it.
        """
        length = len(self.chains[chain])
        if not 0 <= first < stop <= length:
            raise SiteError(
                f"{stop - first} blocks up to block {stop - 1}, but chain {chain} of {self.model} has blocks"
                f" 0..{length - 1}; give a span within them"
            )
        return region_of(self.chains[chain][first:stop], self.streams_of(chain))

    @property
    def joined(self) -> tuple[Site, ...]:
        """The blocks of all chains in a row, or () where one chain doesn't take over what the one before it returns.

        Chains with the same streams do if image and text are both among them, as in Flux. A single stream in common
        shows nothing: chains may interleave, as spatial and temporal blocks, or refine image and text apart.
        """
        streams = {self.streams_of(chain) for chain in range(len(self.chains))}
        consecutive = len(streams) == 1 and len(streams.pop()) > 1
        return tuple(site for chain in self.chains for site in chain) if consecutive else ()

    def join(self, first: int, stop: int | None = None) -> tuple[Region, ...]:
        """Make one region of the blocks `first` to `stop - 1` over all chains, or where they don't join one in each.

        Chains without such blocks have no region.

        >>> double, single = (tuple(Site(f"{name}.{i}", Kind.BLOCK) for i in range(2)) for name in ("double", "single"))
        >>> both = ("encoder_hidden_states", "hidden_states")
        >>> sites = SiteMap("ToyTransformer", (), chains=(double, single), streams=(both, both))
        >>> [region.name for region in sites.join(1)]
        ['double.1..single.1']
        """
        if self.joined:
            chains = [(self.joined, self.streams_of(0))]
        else:
            chains = [(blocks, self.streams_of(chain)) for chain, blocks in enumerate(self.chains)]
        spans = [(blocks[first:stop], streams) for blocks, streams in chains]
        return tuple(region_of(blocks, streams) for blocks, streams in spans if blocks)

    def streams_of(self, chain: int) -> tuple[str, ...]:
        """Name the streams of a chain; () where they are unknown."""
        return self.streams[chain] if chain < len(self.streams) else ()

    def __repr__(self) -> str:
        """Summarise the sites in a line."""
        return f"<SiteMap: {self.describe()}>"

    def describe(self) -> str:
        """Summarize the sites of this model in one line, for errors."""
        counts = Counter(str(site.kind) for site in self.sites)
        parts = [f"{kind} x {count}" for kind, count in sorted(counts.items())]
        if self.regions:
            parts.append(f"nested regions 0..{len(self.regions) - 1}")
        return f"{self.model} has {', '.join(parts) or 'no sites'}"


def region_of(blocks: Sequence[Site], streams: tuple[str, ...]) -> Region:
    """Make a region of consecutive blocks with these streams."""
    names = [site.name for site in blocks]
    name = f"{names[0]}..{names[-1]}"
    return Region(name, exit=names[-1], skipped=tuple(names[:-1]), entry=names[0], streams=streams)


def _is_inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")
