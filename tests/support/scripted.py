"""Sites of a toy UNet, and a policy that takes its actions from a string."""

from __future__ import annotations

from typing import ClassVar

from cachekit import (
    DENOISER,
    GUIDANCE,
    OPEN,
    Action,
    BranchChange,
    Choice,
    Kind,
    Moment,
    Policy,
    Region,
    Reuse,
    Schedule,
    Site,
    SiteMap,
    StandIn,
    Where,
)  # fmt: skip

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


class Named(Where):
    """The sites, regions and guidance with these names."""

    name: ClassVar[str] = "named"
    names: tuple[str, ...]

    def find(self, sites: SiteMap):
        everything = (GUIDANCE, DENOISER, *sites.sites, *sites.regions)
        return [target for target in everything if target.name in self.names]


class Script(Schedule):
    """Actions from a string: one of `.Sr?` a step since the origin, the last one repeated."""

    name: ClassVar[str] = "script"
    actions: str

    def action(self, at: Moment):
        place = min(at.step - at.origin, len(self.actions) - 1)
        return {".": Action.COMPUTE, "S": Action.STORE, "r": Action.REUSE, "?": OPEN}[self.actions[place]]


class InsistingScript(Script):
    """The same, of which each STORE must happen in its own step."""

    name: ClassVar[str] = "insisting_script"
    insists: ClassVar[bool] = True


class Scripted(Policy):
    """Take actions on named targets, joined by "+", from a string."""

    name: ClassVar[str] = "scripted"
    change: ClassVar[BranchChange] = BranchChange.REMAINING
    script: str
    at: str = "mid.cross"
    insists: bool = False
    stand_in: StandIn = Reuse()

    def choices(self):
        when = (InsistingScript if self.insists else Script)(actions=self.script)
        return {"script": Choice(Named(names=tuple(self.at.split("+"))), when, self.stand_in, self.change)}
