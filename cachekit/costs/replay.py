"""Count what a run cost by repeating its distinct calls on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

from cachekit.attaching.attachment import Attachment
from cachekit.costs.counting import Forward, count_forward
from cachekit.costs.meta import meta_copy, on_meta
from cachekit.driving.setup import Setup
from cachekit.interface.policy import Action
from cachekit.reports.record import CallRecord, Cost, Record
from cachekit.runs.run import Run
from cachekit.tensors import tree_map

#: What an uncached forward does, by `CallRecord.inputs`.
Baselines = Mapping[tuple[str, str, int], Forward]


def cost_of(setup: Setup, record: Record) -> Cost:
    """Count the MACs of a run's calls, and those of the same calls uncached."""
    twins = {name: meta_copy(denoiser.module) for name, denoiser in setup.denoisers.items()}
    record = replace(record, inputs={key: tree_map(on_meta, inputs) for key, inputs in record.inputs.items()})
    baselines = {key: count_forward(twins[key[0]], *inputs) for key, inputs in record.inputs.items()}
    with Attachment(Setup.of(twins, setup.policies, setup.catalog)) as replica:
        replica.install(next(iter(twins.values())))
        forwards, _ = replay(replica, record, baselines)
    per_call = tuple(forward.macs for forward in forwards)
    return Cost(sum(per_call), sum(baselines[call.inputs].macs for call in record.calls), per_call)


def replay(replica: Attachment, record: Record, baselines: Baselines) -> tuple[list[Forward], int]:
    """Repeat a run; count what each of its calls does, and the peak of bytes kept.

    `replica` is attached to denoisers on the meta device, where the arguments in `record.inputs` are too. Calls with
    the same shapes and actions cost the same, so each distinct one runs once, in order; it runs again only where it
    keeps something that was dropped since.
    """
    found: dict[tuple[object, ...], Forward] = {}
    with replaying(replica, record) as replayer:
        for call in record.calls:
            if call.signature not in found or replayer.lacks(call):
                found[call.signature] = _count(call, replayer, baselines)
        return [found[call.signature] for call in record.calls], replayer.peak_bytes


def _count(call: CallRecord, replayer: Replayer, baselines: Baselines) -> Forward:
    if call.dropped:
        return Forward(0, 0, frozenset())
    if call.row.narrowed_by is None and set(call.row.actions) <= {Action.COMPUTE}:
        return baselines[call.inputs]
    return replayer.repeat(call)


@contextlib.contextmanager
def replaying(replica: Attachment, record: Record) -> Iterator[Replayer]:
    """Begin a run like the recorded one within the block."""
    with replica.driver.replaying(record.layout, record.steps) as run:
        yield Replayer(replica, run, record)


class Replayer:
    """Repeats recorded calls within one run, through the same driver and switches as the originals."""

    def __init__(self, replica: Attachment, run: Run, record: Record) -> None:
        """Repeat calls of `record` in `run`."""
        self._replica, self._run, self._record = replica, run, record

    def repeat(self, call: CallRecord) -> Forward:
        """Call the denoiser once, do what was done in `call`, and count it."""
        self._replica.driver.expect(call)
        args, kwargs = self._record.inputs[call.inputs]
        return count_forward(self._replica.setup.denoisers[call.denoiser].module, args, kwargs)

    def lacks(self, call: CallRecord) -> bool:
        """Whether `call` stores something that isn't kept now, so that a later call couldn't reuse it."""
        kept = self._run.store.sizes()
        stored = (index for index, action in enumerate(call.row.actions) if action is Action.STORE)
        return any(i not in kept and self._replica.setup.assignments[i].denoiser == call.denoiser for i in stored)

    @property
    def peak_bytes(self) -> int:
        """Most bytes kept at once so far."""
        return self._run.store.peak_bytes
