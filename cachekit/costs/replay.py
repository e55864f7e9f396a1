"""Count a run's multiply-accumulates by repeating its distinct calls on the meta device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from cachekit.costs.counting import Forward, Known, count_forward
from cachekit.costs.meta import meta_copy, on_meta
from cachekit.driving.driver import Driver
from cachekit.driving.inputs import CallInputs
from cachekit.driving.setup import Setup
from cachekit.interface.moment import Action
from cachekit.runs.call import Call
from cachekit.runs.denoiser import Denoiser
from cachekit.runs.record import CallRecord, Cost, Record
from cachekit.runs.run import Run
from cachekit.tensors import tree_map

#: What an uncached forward does, by `CallRecord.inputs`.
Baselines = Mapping[tuple[str, str, int], Forward]


def cost_of(setup: Setup, record: Record) -> Cost:
    """Count the MACs of a run's calls, and those of the same calls uncached."""
    twins = {name: meta_copy(denoiser.module) for name, denoiser in setup.denoisers.items()}
    record = replace(record, inputs={key: tree_map(on_meta, inputs) for key, inputs in record.inputs.items()})
    baselines = {key: count_forward(twins[key[0]], *inputs) for key, inputs in record.inputs.items()}
    forwards, _ = replay(setup.on(twins), record, baselines)
    per_call = tuple(forward.macs for forward in forwards)
    return Cost(sum(per_call), sum(baselines[call.inputs].macs for call in record.calls), per_call)


def replay(setup: Setup, record: Record, baselines: Baselines, known: Known | None = None) -> tuple[list[Forward], int]:
    """Repeat a run; count what each of its calls does, and the peak of bytes kept.

    The denoisers of `setup` and the arguments in `record.inputs` are on the meta device. `known` is what former
    forwards of these denoisers have shown. Calls with the same shapes and actions cost the same, so each distinct one
    runs once, in order; it runs again only where it keeps something that was dropped since.
    """
    driver = ReplayDriver(setup, record, known or Known())
    driver.installation.install(driver.scope.regime.duties)
    found: dict[tuple[object, ...], Forward] = {}
    try:
        for call in record.calls:
            if call.signature not in found or driver.lacks(call):
                found[call.signature] = _count(call, driver, baselines)
            driver.note(call)
    finally:
        driver.installation.uninstall()
    return [found[call.signature] for call in record.calls], driver.peak_bytes


def _count(call: CallRecord, driver: ReplayDriver, baselines: Baselines) -> Forward:
    if call.dropped or call.left_out:
        return Forward(0, 0, frozenset())
    if call.row.narrowed_by is None and set(call.row.actions) <= {Action.COMPUTE}:
        return baselines[call.inputs]
    return driver.repeat(call)


class ReplayDriver(Driver):
    """Repeats recorded calls within one run, through the same switches as the originals."""

    def __init__(self, setup: Setup, record: Record, known: Known) -> None:
        """Repeat calls of `record`."""
        super().__init__(setup)
        self._record, self._known = record, known
        plan = setup.plan(record.steps, record.layout, times=record.times)
        self._run = Run(plan, record.layout, record.steps, images=1, is_replayed=True)
        self._wholes = plan.wholes
        self._next: CallRecord | None = None
        self._stored: Counter[int] = Counter()

    def locate(self, denoiser: Denoiser, inputs: CallInputs) -> Call | None:
        """Plan the call that is repeated; None for any other."""
        record, self._next = self._next, None
        if record is None:
            return None
        self._run.enter(record.row)
        caller = (record.denoiser, record.branch)
        whole = self._wholes.get(record.denoiser)
        return Call(self._run.keeper, self._run.calls, record.row, caller, inputs.batch, whole=whole)

    def repeat(self, call: CallRecord) -> Forward:
        """Call the denoiser once, do what was done in `call`, and count it."""
        self._next = call
        args, kwargs = self._record.inputs[call.inputs]
        return count_forward(self.setup.denoisers[call.denoiser].module, args, kwargs, self._known)

    def lacks(self, call: CallRecord) -> bool:
        """Whether `call` stores what isn't kept now, or less of it than the run had at that point."""
        return any(self._run.keeper.store.count(index) < self._wanted(index) for index in self._stores(call))

    def note(self, call: CallRecord) -> None:
        """Count what a call of the recorded run stores."""
        self._stored.update(self._stores(call))

    def _stores(self, call: CallRecord) -> list[int]:
        stored = (index for index, action in enumerate(call.row.actions) if action is Action.STORE)
        return [index for index in stored if self.setup.assignments[index].denoiser == call.denoiser]

    def _wanted(self, index: int) -> float:
        entries = self.setup.assignments[index].choice.what.entries
        return min(math.inf if entries is None else entries, max(self._stored[index], 1))

    @property
    def peak_bytes(self) -> int:
        """Most bytes kept at once so far."""
        return self._run.keeper.store.peak_bytes
