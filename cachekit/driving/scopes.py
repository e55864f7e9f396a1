"""What runs follow: policies and a limit, for all runs of an attachment or for those of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from cachekit.driving.outputs import OutputFinisher
from cachekit.driving.pipelines import Pipelines
from cachekit.driving.setup import Setup
from cachekit.driving.starting import Fitting, RunStarter
from cachekit.errors import AttachmentError
from cachekit.interface.policy import Policy
from cachekit.interface.presets import Preset
from cachekit.runs.limit import Limit
from cachekit.runs.report import Report
from cachekit.runs.state import RunState
from cachekit.switches.duties import duties_of

#: Most regimes of blocks that are held.
_MOST_REGIMES = 32


class Regime:
    """Policies that runs follow, within a limit on what they keep: how such runs start, finish, and use each module.

    Runs, blocks and threads share it. The `duties` of modules are by the names of their denoisers.
    """

    def __init__(self, setup: Setup, limit: Limit, fitting: Fitting, state: RunState, pipelines: Pipelines) -> None:
        """Prepare for runs of `setup`; nothing is installed."""
        self.setup = setup
        self.limit = limit
        self.starter = RunStarter(setup, limit, fitting(limit))
        self.finisher = OutputFinisher(setup, state, pipelines)
        self.duties = {name: duties_of(setup.assignments, denoiser) for name, denoiser in setup.denoisers.items()}

    def is_of(self, policies: Sequence[Policy], presets: Sequence[Preset], limit: Limit) -> bool:
        """Whether it is what these make."""
        mine = (self.setup.policies, self.setup.presets, self.limit)
        return mine == (tuple(policies), tuple(presets), limit)


def no_run() -> AttachmentError:
    """Make the error of a report before there is one."""
    return AttachmentError("no run yet: call the pipeline, then report()")


class Scope:
    """The runs that follow one regime: those of a `using` block, or all others of an attachment."""

    def __init__(self, regime: Regime) -> None:
        """Start without a run."""
        self.regime = regime
        self.last_report: Report | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last report out of copies: they have not run yet."""
        return {**vars(self), "last_report": None}

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies, in the order of their specs."""
        return self.regime.setup.policies

    def report(self) -> Report:
        """Report on the run of these that began last, in whatever thread.

        Raises `AttachmentError` before that.
        """
        if self.last_report is None:
            raise no_run()
        return self.last_report


#: The scopes that are entered in a thread or an asyncio task, by the attachment that they belong to.
_ENTERED: ContextVar[Mapping[Scopes, Scope]] = ContextVar("cachekit_scopes", default=MappingProxyType({}))


class Scopes:
    """The scopes of one attachment: `applied`, and one for each `using` block that is entered.

    Blocks are entered in a context of `contextvars`: one for each thread, and for each asyncio task. A thread that
    `asyncio.to_thread` starts has that of its task.
    """

    def __init__(self, setup: Setup, limit: Limit, fitting: Fitting, state: RunState, pipelines: Pipelines) -> None:
        """Start outside of all blocks, where runs follow `setup` within `limit`."""
        self._fitting = fitting
        self._state = state
        self._pipelines = pipelines
        self.applied = Scope(Regime(setup, limit, fitting, state, pipelines))
        #: The regimes of the last blocks, the newest first.
        self._recent: list[Regime] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave the regimes of blocks out of copies."""
        return {**vars(self), "_recent": []}

    @property
    def entered(self) -> Scope:
        """The scope of runs that begin now: of the innermost block, or `applied`."""
        return _ENTERED.get().get(self, self.applied)

    def find(self, policies: Sequence[Policy], presets: Sequence[Preset], limit: Limit) -> Regime | None:
        """Find the regime of these policies within a limit, if it is applied or a block had it."""
        known = (self.applied.regime, *self._recent)
        return next((regime for regime in known if regime.is_of(policies, presets, limit)), None)

    def make(self, policies: Sequence[Policy], presets: Sequence[Preset], limit: Limit) -> Regime:
        """Make a regime for blocks; raises a `CachekitError` where the policies don't fit the denoisers."""
        setup = self.applied.regime.setup.following(policies, presets)
        return Regime(setup, limit, self._fitting, self._state, self._pipelines)

    def hold(self, regime: Regime) -> None:
        """Hold a regime for the next block like its first."""
        self._recent = [regime, *self._recent[: _MOST_REGIMES - 1]]

    @contextlib.contextmanager
    def enter(self, regime: Regime) -> Iterator[Scope]:
        """Have runs follow `regime` that begin within the block."""
        before, scope = _ENTERED.get(), Scope(regime)
        _ENTERED.set({**before, self: scope})
        try:
            yield scope
        finally:
            # Not by a token: a block may be left in another context than it was entered in.
            _ENTERED.set(before)
