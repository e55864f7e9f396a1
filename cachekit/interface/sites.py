"""Name the places in a denoiser where a policy can act: sites, regions and the map of both."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Union

#: Names of guidance branches, in an order.
Branches = tuple[str, ...]


class Kind(str, Enum):
    """Tell what a site is; policies register for kinds, never for module classes."""

    CROSS_ATTENTION = "cross_attention"
    SELF_ATTENTION = "self_attention"
    JOINT_ATTENTION = "joint_attention"
    FEED_FORWARD = "feed_forward"
    BLOCK = "block"
    GUIDANCE = "guidance"

    def __str__(self) -> str:
        """Return the word used in reports and errors."""
        return self.value


@dataclass(frozen=True)
class Site:
    """Name one module of the denoiser (fully qualified, as in `named_modules`) and its kind."""

    name: str
    kind: Kind

    def covers(self, name: str) -> bool:
        """Tell whether module `name` lies inside this site, so does not run when it is reused."""
        return _inside(name, self.name)


@dataclass(frozen=True)
class Region:
    """Name a run of consecutive sites that can be skipped as a whole.

    `exit` is the module whose output is kept; `skipped` are the other modules that then do not run.
    `entry` is the module whose inputs `streams` (parameter names, in the order of the exit's tensors) enter
    the region, or empty where entry and exit differ in shape, so that no residual exists.
    `probe` names a module outside the region whose output lets a policy decide inside a call.
    `edited` says that later code may change the exit's tensor in place, so that it must be copied.
    `encoder` are those of the skipped modules that a ControlNet has too: what it makes there is only added to
    what these would have made.
    """

    name: str
    exit: str
    skipped: tuple[str, ...]
    entry: str = ""
    streams: tuple[str, ...] = ()
    probe: str = ""
    edited: bool = False
    encoder: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """Return the kind of every region: a run of blocks."""
        return Kind.BLOCK

    def covers(self, name: str) -> bool:
        """Tell whether module `name` does not run when the region is reused."""
        return any(_inside(name, module) for module in (self.exit, *self.skipped))


Target = Union[Site, Region]

#: The choice of branches, present in every denoiser.
GUIDANCE = Site("guidance", Kind.GUIDANCE)


@dataclass(frozen=True)
class SiteMap:
    """Hold what an adapter says of one denoiser.

    `regions` are the named regions (a UNet's nested ones, in order of depth); `chains` are runs of
    consecutive blocks of a transformer, from which `span` makes a region; `streams` belong to the chains.
    """

    model: str
    sites: tuple[Site, ...]
    regions: tuple[Region, ...] = ()
    chains: tuple[tuple[Site, ...], ...] = ()
    streams: tuple[tuple[str, ...], ...] = ()

    def of(self, *kinds: Kind) -> tuple[Site, ...]:
        """Return the sites of these kinds, the guidance site included when asked for."""
        return tuple(site for site in (GUIDANCE, *self.sites) if site.kind in kinds)

    def span(self, first: int, stop: int, chain: int = 0) -> Region:
        """Return the region of blocks `first` to `stop - 1` of a chain of consecutive blocks."""
        blocks = [site.name for site in self.chains[chain][first:stop]]
        streams = self.streams[chain] if chain < len(self.streams) else ()
        name = f"{blocks[0]}..{blocks[-1]}"
        return Region(name, exit=blocks[-1], skipped=tuple(blocks[:-1]), entry=blocks[0], streams=streams)

    def describe(self) -> str:
        """Return one line that says what this model has, for errors."""
        counts = Counter(str(site.kind) for site in self.sites)
        parts = [f"{kind} x {count}" for kind, count in sorted(counts.items())]
        if self.regions:
            parts.append(f"nested regions 0..{len(self.regions) - 1}")
        return f"{self.model} has {', '.join(parts) or 'no sites'}"


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")
