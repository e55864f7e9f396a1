"""Sites of a toy UNet, and a policy that takes its actions from a string."""

from __future__ import annotations

from typing import ClassVar

from cachekit import GUIDANCE, Action, Kind, Moment, Policy, Region, Site, SiteMap

#: Sites of a UNet: an attention outside every region, one inside the middle region, one in the deepest.
TOY = SiteMap(
    "ToyUNet",
    (
        Site("down.0.cross", Kind.CROSS_ATTENTION),
        Site("down.1.cross", Kind.CROSS_ATTENTION),
        Site("mid.cross", Kind.CROSS_ATTENTION),
        Site("mid.self", Kind.SELF_ATTENTION),
        Site("down.0", Kind.BLOCK),
        Site("down.1", Kind.BLOCK),
        Site("mid", Kind.BLOCK),
    ),
    regions=(
        Region("region 0", exit="up.0", skipped=("down.0", "down.1", "mid")),
        Region("region 1", exit="up.0", skipped=("down.1", "mid")),
    ),
    chains=((Site("down.0", Kind.BLOCK), Site("down.1", Kind.BLOCK), Site("mid", Kind.BLOCK)),),
    streams=(("x",),),
)


class Scripted(Policy):
    """Take actions on named targets from a string: one of `.Sr` a step since the origin, the last one repeated."""

    name: ClassVar[str] = "scripted"
    kinds: ClassVar[frozenset[Kind]] = frozenset(Kind)
    script: str
    at: str = "mid.cross"

    def select(self, sites: SiteMap):
        everything = (GUIDANCE, *sites.sites, *sites.regions)
        return [target for target in everything if target.name in self.at.split("+")]

    def action(self, target, at: Moment):
        place = min(at.step - at.origin, len(self.script) - 1)
        return {".": Action.COMPUTE, "S": Action.STORE, "r": Action.REUSE}[self.script[place]]
