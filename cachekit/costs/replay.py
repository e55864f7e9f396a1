"""Count a run's multiply-accumulates by replaying its distinct calls on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cachekit.costs.counting import Forward, count_forward
from cachekit.costs.meta import meta_copy, on_meta
from cachekit.driving.driver import Driver
from cachekit.driving.inputs import CallInputs
from cachekit.driving.setup import Setup
from cachekit.interface.adapter import Layout
from cachekit.interface.policy import Action
from cachekit.reports.record import CallRecord, Cost, Record
from cachekit.runs.call import Call
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.run import Run
from cachekit.tensors import tree_map

#: The arguments (args, kwargs) of uncached forwards, by `CallRecord.inputs`.
Inputs = Mapping[Any, Any]


def cost_of(setup: Setup, record: Record) -> Cost:
    """Count what the calls of `record` cost, and what they would have cost uncached."""
    twins = {name: meta_copy(denoiser.module) for name, denoiser in setup.denoisers.items()}
    inputs = {key: tree_map(on_meta, arguments) for key, arguments in record.inputs.items()}
    full = {key: count_forward(twins[key[0]], *arguments) for key, arguments in inputs.items()}
    driver = ReplayDriver(setup.on(twins), record.layout, record.steps)
    driver.installation.install()
    forwards, _ = replay(driver, record.calls, inputs, full)
    per_call = tuple(forward.macs for forward in forwards)
    return Cost(sum(per_call), sum(full[call.inputs].macs for call in record.calls), per_call)


class ReplayDriver(Driver):
    """Makes each call do what is recorded of another one."""

    def __init__(self, setup: Setup, layout: Layout, steps: int) -> None:
        """Replay a run of `steps` steps whose branches came as `layout` says."""
        super().__init__(setup)
        self.run = Run(setup.plan(steps, layout), layout, steps, images=1)
        self.expected: CallRecord | None = None

    def locate(self, denoiser: Denoiser, inputs: CallInputs) -> Call | None:
        """Make the call that was recorded; None for any other."""
        record, self.expected = self.expected, None
        if record is None:
            return None
        self.run.enter(record.row)
        caller = (record.denoiser, record.branch)
        return Call(self.run.keeper, self.run.calls, record.row, caller, inputs.batch)


def replay(
    driver: ReplayDriver, calls: Sequence[CallRecord], inputs: Inputs, full: Mapping[Any, Forward]
) -> tuple[list[Forward], int]:
    """Count what each call does, and the peak of bytes kept.

    Calls with the same shapes and actions cost the same, so each distinct one runs once, in order, by the same
    engine that drives a run; again only where it keeps what had been dropped meanwhile. A call that keeps and reuses
    nothing does what the uncached forward did, which `full` holds by `CallRecord.inputs`.
    """
    store = driver.run.keeper.store
    found: dict[Any, Forward] = {}
    for call in calls:
        if call.signature in found and not _keeps_anew(driver, call, store.sizes()):
            continue
        if call.dropped:
            found[call.signature] = Forward(0, 0, frozenset())
        elif call.row.narrowed_by is None and set(call.row.actions) <= {Action.COMPUTE}:
            found[call.signature] = full[call.inputs]
        else:
            driver.expected = call
            args, kwargs = inputs[call.inputs]
            found[call.signature] = count_forward(driver.setup.denoisers[call.denoiser].module, args, kwargs)
    return [found[call.signature] for call in calls], store.peak_bytes


def _keeps_anew(driver: Driver, call: CallRecord, kept: Collection[int]) -> bool:
    """Whether a call keeps something that is not there, so that a later one could not reuse it."""
    own = (i for i, action in enumerate(call.row.actions) if action is Action.STORE)
    return any(i not in kept and driver.setup.assignments[i].denoiser == call.denoiser for i in own)
