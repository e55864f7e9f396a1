"""What a caching policy defines: its settings, its targets, its rule, and what it keeps and restores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Final

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
    """What happens at a target in one step.

    `COMPUTE` runs it and keeps nothing, `STORE` runs it and keeps its output (`Policy.to_keep`), `REUSE` skips it
    and returns what the last `STORE` kept (`Policy.restore`). A `REUSE` for which nothing is kept computes, and
    is counted as a miss.
    """

    COMPUTE = "compute"
    STORE = "store"
    REUSE = "reuse"


#: Returned by `Policy.action` to leave the decision to `decide` or `probe`, during the run.
OPEN: Final = None


class BranchChange(str, Enum):
    """What becomes of kept tensors when a guidance branch is dropped.

    `REMAINING` keeps the part of the branch that still runs, `MEAN` the mean over all branches. `REFRESH` keeps
    nothing: the policy's schedule starts anew, with `Moment.origin` at the step where the branches changed.
    """

    REMAINING = "remaining"
    MEAN = "mean"
    REFRESH = "refresh"


@dataclass(frozen=True)
class Moment:
    """The step for which an action is asked.

    `step` is the 0-based iteration of the pipeline's loop and `steps` the number of iterations. `origin` is the step
    at which this policy's schedule last started anew: 0, or later after a change of branches or a full step that
    another policy made necessary.
    """

    step: int
    steps: int
    origin: int = 0


class Policy(BaseModel):
    """Base of all policies: subclass it, set `name`, `summary` and `kinds`, add fields, write `action`.

    A whole policy, which computes self-attention every second step and reuses it in between:

    >>> class EverySecond(Policy):
    ...     name: ClassVar[str] = "every_second"
    ...     kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.SELF_ATTENTION})
    ...     start: int = 0
    ...     def action(self, target: Target, at: Moment) -> Action:
    ...         return Action.REUSE if at.step > self.start and at.step % 2 else Action.STORE
    >>> str(EverySecond(start=4))
    'every_second:start=4'

    The fields are the keys of the spec; pydantic checks their values. Instances are frozen, so that runs and threads
    can share them: what changes during a run belongs in the `memory` dict that some methods are given, which lives
    as long as the run. A list under `memory["trace"]` is shown in the report.

    All methods but `action` have a default. Tensors are `(branches * batch, ...)`; where a batch holds two guidance
    branches, `Layout.order` is their order along dimension 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    #: The word before the colon of a spec: lower case, digits and underscores.
    name: ClassVar[str] = ""
    #: One line for listings.
    summary: ClassVar[str] = ""
    #: Where the method was published, such as "arXiv 2404.02747".
    paper: ClassVar[str] = ""
    #: The kinds of targets that the policy acts on; at least one.
    kinds: ClassVar[frozenset[Kind]] = frozenset()
    #: What becomes of kept tensors when a guidance branch is dropped.
    on_branch_change: ClassVar[BranchChange] = BranchChange.REMAINING
    #: Whether `to_keep` builds on what was kept before: if so, a STORE that no REUSE reads is carried out too.
    keeps_history: ClassVar[bool] = False

    # -- where --------------------------------------------------------------------------------------------

    def select(self, sites: SiteMap) -> Sequence[Target]:
        """Choose the sites or regions to act on, once, in `apply`; by default all sites of the policy's kinds.

        Raises `SiteError` where this model has none of them, the guidance site not counted.
        """
        found = sites.of(*self.kinds)
        wanted = self.kinds - {Kind.GUIDANCE}
        if wanted and not any(site.kind in wanted for site in found):
            looked_for = ", ".join(sorted(str(kind) for kind in wanted))
            raise SiteError(f"{self}: looked for {looked_for}, but {sites.describe()}; use another policy")
        return found

    # -- when ---------------------------------------------------------------------------------------------

    def action(self, target: Target, at: Moment) -> Action | None:
        """Decide from the schedule alone what happens at `target` in step `at.step`.

        `OPEN`, which is None, leaves it to the run: to `probe` for a region with a probe, to `decide` otherwise.
        The answer must depend on the arguments alone, because it is also asked for plans and estimates. At the
        guidance site REUSE drops a branch, and STORE keeps something for it while both still run.
        """
        raise NotImplementedError

    def decide(self, target: Target, at: Moment, memory: dict[str, Any]) -> Action:
        """Decide, at the beginning of a step, an action that `action` left open."""
        return Action.COMPUTE

    def probe(self, target: Target, at: Moment, value: Streams, memory: dict[str, Any]) -> Action:
        """Decide, within a call, an open action of a region from `value`, the output of its probe.

        `memory` is kept apart for each set of branches, so that branches with calls of their own do not mix.
        """
        return Action.STORE

    @property
    def observes(self) -> bool:
        """Whether `observe` is called; override it if the policy's fields can make that unnecessary."""
        return type(self).observe is not Policy.observe

    def observe(self, seen: Observation, memory: dict[str, Any]) -> None:
        """Look at the outputs of the branches after a guided call, for later steps' `decide`."""

    # -- what ---------------------------------------------------------------------------------------------

    def to_keep(self, output: Streams, entry: Streams, before: Any, at: Moment) -> Any:
        """Choose what a STORE keeps of a computed output: tensors `(branches * batch, ...)` in any nesting.

        `entry` holds the tensors that entered the region, and is empty for sites and for regions without an entry.
        `before` is what the last STORE kept, or None.
        """
        return output

    def restore(self, kept: Any, entry: Streams, at: Moment) -> Streams:
        """Make the output of a reused target from what was kept, and from the tensors that enter it now."""
        streams: Streams = kept
        return streams

    # -- guidance -----------------------------------------------------------------------------------------

    def stays(self, layout: Layout) -> str:
        """Name the branch that runs on when this policy drops one: "cond" or "uncond"."""
        return "cond"

    def branches_to_keep(self, outputs: Mapping[str, Tensor]) -> Any:
        """Choose what a STORE at the guidance site keeps of both branches' outputs, for `restore_branch`.

        `outputs` maps each branch to its `(batch, ...)`. A denoiser that returns several tensors, video and sound
        for instance, asks once for each.
        """
        return None

    def restore_branch(self, output: Tensor, kept: Any) -> Tensor:
        """Make the output of the dropped branch from that of the remaining one, both `(batch, ...)`."""
        return output

    # -- text ---------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        """Write the policy as a spec that parses back to an equal one; defaults are left out."""
        pairs = self.model_dump(exclude_defaults=True)
        text = ",".join(f"{key}={_word(value)}" for key, value in pairs.items())
        return f"{self.name}:{text}" if text else self.name


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    return str(value.value if isinstance(value, Enum) else value)
