"""Define what a caching policy can say: a frozen config, a rule, and what is kept and restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from cachekit.errors import SiteError
from cachekit.interface.sites import Kind, SiteMap, Target

if TYPE_CHECKING:
    from torch import Tensor

    from cachekit.interface.adapter import Layout
    from cachekit.interface.observation import Observation

#: The tensors that flow through a module or region, in order: hidden states, and text states beside them.
Streams = tuple["Tensor", ...]


class Action(str, Enum):
    """Say what happens at a site in a step."""

    COMPUTE = "compute"
    STORE = "store"
    REUSE = "reuse"


class BranchChange(str, Enum):
    """Say what becomes of kept tensors when the number of guidance branches falls.

    REMAINING keeps the part of the branch that stays, MEAN the mean of all, REFRESH nothing: the policy's
    schedule starts anew at that step.
    """

    REMAINING = "remaining"
    MEAN = "mean"
    REFRESH = "refresh"


@dataclass(frozen=True)
class Moment:
    """Say when an action is asked for.

    `step` is the 0-based iteration of the pipeline's loop, `steps` their number, `origin` the step at which
    this policy's schedule last started anew (0, or later after a change of branches or a forced full step).
    """

    step: int
    steps: int
    origin: int = 0


class Policy(BaseModel):
    """Base of all policies: subclass, set `name`, `kinds` and `summary`, add fields, write `action`.

    Fields are the keys of the spec string. Instances are frozen, so that they can be shared by runs and
    threads; what changes during a run lives in the `memory` dict that the engine hands to each method. What a
    policy puts under `memory["trace"]` (a list) is shown in the report.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    kinds: ClassVar[frozenset[Kind]] = frozenset()
    on_branch_change: ClassVar[BranchChange] = BranchChange.REMAINING
    #: Set where `to_keep` builds on what was kept before: then a STORE that no REUSE reads is not idle.
    keeps_history: ClassVar[bool] = False

    # -- which places -------------------------------------------------------------------------------------

    def select(self, sites: SiteMap) -> Sequence[Target]:
        """Return the sites or regions to act on; by default every site of the registered kinds.

        Raise `SiteError` when this model has nothing to act on.
        """
        found = sites.of(*self.kinds)
        wanted = self.kinds - {Kind.GUIDANCE}
        if wanted and not any(site.kind in wanted for site in found):
            looked_for = ", ".join(sorted(str(kind) for kind in wanted))
            raise SiteError(f"{self}: looked for {looked_for}, but {sites.describe()}; use another policy")
        return found

    # -- the rule -----------------------------------------------------------------------------------------

    def action(self, target: Target, at: Moment) -> Action | None:
        """Return the action from the schedule alone, or None where it is decided during the run."""
        raise NotImplementedError

    def decide(self, target: Target, at: Moment, memory: dict[str, Any]) -> Action:
        """Return the action at the beginning of a step whose `action` is None (observing policies)."""
        return Action.COMPUTE

    def probe(self, target: Target, at: Moment, value: Streams, memory: dict[str, Any]) -> Action:
        """Return the action of a region from the tensors seen at its probe, inside a call.

        `memory` is kept per branch set, so that branches computed in separate calls do not mix.
        """
        return Action.STORE

    def observe(self, seen: Observation, memory: dict[str, Any]) -> None:
        """Look at the outputs of the branches at the end of a guided call, for later `decide`."""

    # -- what is kept, what is restored -------------------------------------------------------------------

    def to_keep(self, output: Streams, entry: Streams, before: Any, at: Moment) -> Any:
        """Return what is kept of a computed output: tensors `(branches * batch, ...)` in any nesting.

        `entry` holds the tensors that entered the region (empty for attention sites), `before` what was
        kept last time or None.
        """
        return output

    def restore(self, kept: Any, entry: Streams, at: Moment) -> Streams:
        """Return the output that stands in for a computed one."""
        streams: Streams = kept
        return streams

    # -- guidance -----------------------------------------------------------------------------------------

    def stays(self, layout: Layout) -> str:
        """Return the branch that stays when this policy narrows the guidance."""
        return "cond"

    def branches_to_keep(self, outputs: Mapping[str, Tensor]) -> Any:
        """Return what is kept of a guided step for `restore_branch`; needs STORE at the guidance site.

        It is asked for each tensor of a denoiser that returns several: video and sound, say.
        """
        return None

    def restore_branch(self, output: Tensor, kept: Any) -> Tensor:
        """Return the dropped branch's output from the remaining one's `(batch, ...)`."""
        return output

    # -- text ---------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Return the canonical spec, which parses back to an equal policy."""
        pairs = self.model_dump(exclude_defaults=True)
        text = ",".join(f"{key}={_word(value)}" for key, value in pairs.items())
        return f"{self.name}:{text}" if text else self.name


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    return str(value.value if isinstance(value, Enum) else value)
