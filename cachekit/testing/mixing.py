"""Checks that nothing leaks between branches, images and steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from cachekit.interface.moment import Action, Open
from cachekit.interface.parts import BranchChange
from cachekit.interface.sites import Kind
from cachekit.planning.assignments import Assignment
from cachekit.testing.results import CheckFailedError, NotApplicableError
from cachekit.testing.spies import Prediction
from cachekit.testing.steering import on_a_fixed_path, standing_still, steered
from cachekit.testing.subject import CachedRun, Subject, distance

#: Sums in another order.
_ROUNDING = 1e-4
#: What differences of a batch's order of operations grow to over a guided run.
_GROWN = 1e-3

Key = tuple[Any, ...]


def check_branches_do_not_mix(subject: Subject) -> None:
    """What is kept and predicted of a guidance branch does not depend on the other branch's prompt.

    The samples of all steps are fixed beforehand, since guidance mixes the branches in each of them.
    """
    if not subject.model.guided:
        raise NotApplicableError("the model is unguided")
    plain, opposed, prompted = (_on_fixed_path(subject, **change) for change in ({}, {"negative": 9}, {"positive": 8}))
    compared = 0
    for branch, changed, other in (("cond", opposed, "uncond"), ("uncond", prompted, "cond")):
        for before, after in _alike(subject, plain, changed):
            if branch in before.at.branches:
                compared += 1
                _require_alike(before, after, branch, other)
    if not compared:
        raise NotApplicableError("nothing is predicted in steps with both branches")


def _on_fixed_path(subject: Subject, **change: Any) -> CachedRun:
    with subject.applied() as attachment, steered(subject.pipe, on_a_fixed_path):
        return subject.draw(attachment, replace(subject.call, **change))


def _alike(subject: Subject, before: CachedRun, after: CachedRun) -> Iterator[tuple[Prediction, Prediction]]:
    """Pair the predictions of two runs that were made at the same place from entries of the same steps."""
    takes_mean = any(bound.choice.change is BranchChange.MEAN for bound in subject.plan.assignments)
    others = dict(_by_place(after))
    for key, one in _by_place(before):
        rows = before.report.record.rows
        is_mean = takes_mean and len(rows[one.at.step].branches) < len(before.report.record.layout.order)
        other = others.get(key)
        is_guidance = one.at.target is not None and one.at.target.kind is Kind.GUIDANCE
        if other is None or is_mean or is_guidance:
            continue
        if [entry.at.step for entry in one.history] == [entry.at.step for entry in other.history]:
            yield one, other


def _by_place(drawn: CachedRun) -> Iterator[tuple[Key, Prediction]]:
    seen: Counter[Key] = Counter()
    for found in drawn.predictions:
        key = (found.place, found.at.branches)
        seen[key] += 1
        yield (*key, seen[key]), found


def _require_alike(before: Prediction, after: Prediction, branch: str, other: str) -> None:
    histories = (zip(one.tensors, two.tensors) for one, two in zip(before.history, after.history))
    kept = [pair for history in histories for pair in history]
    for what, pairs in (("kept", kept), ("predicted", list(zip(before.made, after.made)))):
        for one, two in pairs:
            far = distance(*(_part(tensor, before.at.branches, branch) for tensor in (two, one)))
            if far > _ROUNDING:
                raise CheckFailedError(
                    f"what is {what} of the branch {branch!r} changes with the prompt of {other!r} (by {far:.2g} of its"
                    f" norm) for {before.place}"
                )


def _part(tensor: torch.Tensor, branches: tuple[str, ...], branch: str) -> torch.Tensor:
    return tensor.chunk(len(branches))[branches.index(branch)]


def check_batch_items_independent(subject: Subject) -> None:
    """An image of a batch equals the image alone, up to rounding."""
    batch = replace(subject.call, images=(0, 1))
    together = subject.draw_fresh(batch)
    for image in batch.images:
        call = replace(subject.call, images=(image,))
        alone = subject.first if call == subject.call else subject.draw_fresh(call)
        if _actions(alone) != _actions(together):
            raise NotApplicableError("decides for a batch as a whole, in the run")
        plain = distance(subject.uncached(batch)[image : image + 1], subject.uncached(call))
        far = distance(together.image[image : image + 1], alone.image)
        if far > _GROWN + 10 * plain:
            raise CheckFailedError(
                f"image {image} of a batch of 2 differs from the image alone by {far:.2g} of its norm"
                f"{_first_leak(together, alone, image, _GROWN + 10 * plain)}"
            )


def _first_leak(together: CachedRun, alone: CachedRun, image: int, bound: float) -> str:
    """Name the first prediction for an image of a batch that isn't what is predicted for the image alone."""
    others = dict(_by_place(alone))
    for key, one in _by_place(together):
        for batch, single in zip(one.made, others[key].made if key in others else ()):
            halves = batch.chunk(len(one.at.branches))
            if distance(torch.cat([half[image : image + 1] for half in halves]), single) > bound:
                return f"; what is predicted differs first for {one.place}"
    return ""


def _actions(drawn: CachedRun) -> list[list[Action | Open]]:
    return [list(call.row.actions) for call in drawn.report.record.calls]


def check_standing_still(subject: Subject) -> None:
    """Where sample and timestep stay the same in all steps, every skipped output is the computed one."""
    assignments = subject.plan.assignments
    prepared = {id(found.part): found.part for found in subject.first.predictions if found.is_prepared}
    reasons = [f"the numbers of {part} hold for one model alone" for part in prepared.values()]
    reason = next(filter(None, [*reasons, *map(_unfit, assignments)]), "")
    if reason:
        raise NotApplicableError(reason)
    with subject.applied() as attachment, standing_still(subject.pipe) as outputs:
        drawn = subject.draw(attachment, subject.call)
    compared = [step for step in range(1, len(outputs)) if _is_whole(drawn, assignments, step)]
    for step in compared:
        far = distance(outputs[step], outputs[0])
        if far > _ROUNDING:
            raise CheckFailedError(f"in step {step} the output differs by {far:.2g} of its norm{_wrong(drawn, step)}")
    if not any(found.at.step in compared for found in drawn.predictions):
        raise NotApplicableError("nothing is predicted in steps with both branches")


def _unfit(bound: Assignment) -> str:
    what = bound.choice.what
    return f"{what} follows the scheduler, which does not stand still" if what.of == "x0" else ""


def _is_whole(drawn: CachedRun, assignments: tuple[Assignment, ...], step: int) -> bool:
    """Whether no branch is dropped for another's output, or its mean with another."""
    row = drawn.report.record.rows[step]
    if row.narrowed_by is None:
        return True
    takes_mean = any(bound.choice.change is BranchChange.MEAN for bound in assignments)
    return not takes_mean and assignments[row.narrowed_by].choice.what.entries != 0


def _wrong(drawn: CachedRun, step: int) -> str:
    """Name the first prediction of a step that isn't what was kept."""
    for found in drawn.predictions:
        pairs = zip(found.made, found.history[0].tensors) if found.history else ()
        if found.at.step == step and any(distance(made, kept) > _ROUNDING for made, kept in pairs):
            return f"; what was predicted for {found.place} is not what was kept"
    return ""
