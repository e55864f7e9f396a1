"""Count a run's multiply-accumulates by replaying its distinct calls on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from cachekit.attaching.attachment import Attachment
from cachekit.costs.counting import Forward, count_forward
from cachekit.costs.meta import meta_copy, on_meta
from cachekit.driving.setup import Setup
from cachekit.interface.adapter import Layout
from cachekit.interface.policy import Action
from cachekit.reports.record import CallRecord, Cost, Record
from cachekit.tensors import tree_map


def cost_of(setup: Setup, record: Record) -> Cost:
    """Return what the calls of `record` cost, and what they would have cost uncached."""
    twins = {name: meta_copy(denoiser.module) for name, denoiser in setup.denoisers.items()}
    inputs = {key: tree_map(on_meta, arguments) for key, arguments in record.inputs.items()}
    full = {key: count_forward(twins[key[0]], *arguments) for key, arguments in inputs.items()}
    with Attachment(Setup.of(twins, setup.policies, setup.catalog)) as replica:
        replica.install(next(iter(twins.values())))
        forwards, _ = replay(replica, record.calls, inputs, full, record.layout, record.steps)
    per_call = tuple(forward.macs for forward in forwards)
    return Cost(sum(per_call), sum(full[made.inputs].macs for made in record.calls), per_call)


def replay(
    attachment: Attachment,
    calls: Sequence[CallRecord],
    inputs: dict[Any, Any],
    full: dict[Any, Forward],
    layout: Layout,
    steps: int,
) -> tuple[list[Forward], int]:
    """Return what each call does, and the peak of bytes kept.

    Calls with the same shapes and actions cost the same, so each distinct one runs once, in order, by the same
    engine that drives a run; again only where it keeps what had been dropped meanwhile. `inputs` maps
    `CallRecord.inputs` to the arguments (args, kwargs) of the uncached forward, `full` to what that did: so does a call
    that keeps and reuses nothing.
    """
    found: dict[Any, Forward] = {}
    with attachment.driver.replaying(layout, steps) as run:
        for made in calls:
            if made.signature in found and not _keeps_anew(attachment, made, run.store.sizes()):
                continue
            if made.dropped:
                found[made.signature] = Forward(0, 0, frozenset())
                continue
            if made.row.narrowed_by is None and set(made.row.actions) <= {Action.COMPUTE}:
                found[made.signature] = full[made.inputs]
                continue
            attachment.driver.expect(made)
            args, kwargs = inputs[made.inputs]
            module = attachment.setup.denoisers[made.denoiser].module
            found[made.signature] = count_forward(module, args, kwargs)
        peak = run.store.peak_bytes
    return [found[made.signature] for made in calls], peak


def _keeps_anew(attachment: Attachment, made: CallRecord, kept: Collection[int]) -> bool:
    """Tell whether a call keeps something that is not there, so that a later one could not reuse it."""
    own = (i for i, action in enumerate(made.row.actions) if action is Action.STORE)
    return any(i not in kept and attachment.setup.assignments[i].denoiser == made.denoiser for i in own)
