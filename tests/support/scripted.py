"""Sites of a toy UNet, and a policy that takes its actions from a string."""

from __future__ import annotations

from typing import ClassVar

from cachekit import (
    DENOISER,
    GUIDANCE,
    Action,
    BranchChange,
    Choice,
    Drop,
    Kind,
    Moment,
    Policy,
    Region,
    Reuse,
    Schedule,
    Site,
    SiteMap,
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


class ByString(Schedule):
    """Take actions from a string: one of `.Sr` a step since the origin, the last one repeated."""

    name: ClassVar[str] = "by_string"
    insists: ClassVar[bool] = True
    script: str

    def action(self, at: Moment):
        place = min(at.step - at.origin, len(self.script) - 1)
        return {".": Action.COMPUTE, "S": Action.STORE, "r": Action.REUSE}[self.script[place]]


class Named(Where):
    """Targets by name, joined by `+`."""

    name: ClassVar[str] = "named"
    names: str

    def find(self, sites: SiteMap):
        everything = (GUIDANCE, DENOISER, *sites.sites, *sites.regions)
        return [target for target in everything if target.name in self.names.split("+")]


class Scripted(Policy):
    """Take actions on named targets from a string; every STORE insists on its step."""

    name: ClassVar[str] = "scripted"
    change: ClassVar[BranchChange] = BranchChange.REMAINING
    script: str
    at: str = "mid.cross"

    def choices(self):
        what = Drop() if self.at == "guidance" else Reuse()
        return {"script": Choice(Named(names=self.at), ByString(script=self.script), what, self.change)}
