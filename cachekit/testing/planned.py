"""Checks of schedules and plans: what is announced happens, and can be combined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

from cachekit.applying import apply
from cachekit.errors import CachekitError, GuidanceError, PolicyError, SiteError
from cachekit.interface.moment import Action, Moment, Open, Time
from cachekit.interface.parts import BranchChange
from cachekit.interface.policy import Policy
from cachekit.interface.specs import parse
from cachekit.planning.assignments import Assignment
from cachekit.runs.record import CallRecord
from cachekit.testing.models import drawn
from cachekit.testing.results import CheckFailedError, NotApplicableError
from cachekit.testing.subject import Subject, require_same_image

#: Policies to combine with, each with a schedule that acts within a few steps.
PARTNERS = ("tgate:m=3", "deepcache:interval=2", "adaptive_guidance:m=3")


def check_schedule_is_pure(subject: Subject) -> None:
    """A schedule gives the same answer to the same question, however often and in whatever order it is asked."""
    for bound in subject.plan.assignments:
        moments = _moments(subject, bound)
        answers = [_asked(bound, at) for at in moments]
        for at, answer in [*zip(moments, answers)][::-1]:
            for other in (_asked(bound, at) for _ in range(_REPEATED)):
                if other is not answer:
                    raise CheckFailedError(
                        f"{bound.choice.when} answers {_word(answer)}, then {_word(other)} for {bound.target.name!r} in"
                        f" step {at.step}"
                    )


#: A counter with a period of less than this is found.
_REPEATED = 9


def check_origin(subject: Subject) -> None:
    """A schedule that starts anew does so with a full step, since nothing is kept then."""
    restarting = [bound for bound in subject.plan.assignments if _restarts(bound)]
    if not restarting:
        raise NotApplicableError("none of its schedules is started anew")
    for bound in restarting:
        for at in _moments(subject, bound)[1:]:
            if _asked(bound, at._replace(origin=at.step)) is Action.REUSE:
                raise CheckFailedError(
                    f"{bound.choice.when} reuses {bound.target.name!r} in step {at.step}, where it starts anew"
                )


def _restarts(bound: Assignment) -> bool:
    if bound.choice.when.insists:  # never full again after some step, by design
        return False
    return bound.choice.change is BranchChange.REFRESH or (bound.is_block and not bound.is_whole)


def _moments(subject: Subject, bound: Assignment) -> list[Moment]:
    times = subject.plan.times or [Time(step) for step in range(subject.steps)]
    return [Moment(step, subject.steps, 0, time, bound.target) for step, time in enumerate(times)]


def _asked(bound: Assignment, at: Moment) -> Action | Open:
    return bound.choice.when.action(at)


def _word(action: Action | Open) -> str:
    return str(action.value)


def check_counts_match_plan(subject: Subject) -> None:
    """Each target is computed, stored and reused as often as the plan shows, and no reuse finds nothing kept."""
    if not subject.plan.is_static:
        raise NotApplicableError("decides in the run")
    record, plan = subject.first.report.record, subject.plan
    for index, bound in enumerate(plan.assignments):
        if record.missed[index]:
            raise CheckFailedError(f"{record.missed[index]} reuses of {bound.target.name!r} found nothing kept")
        if bound.is_guidance:
            is_planned = any(row.narrowed_by == index for row in plan.rows)
            if is_planned != bool(record.counts[index][Action.REUSE]):
                raise CheckFailedError(f"the plan drops {'a' if is_planned else 'no'} branch, the run does otherwise")
            continue
        planned = Counter(action for call in record.calls for action in _planned(subject, index, call))
        done = record.counts[index]
        for action in Action:
            if done[action] != planned[action]:
                raise CheckFailedError(
                    f"{bound.target.name!r}: {action.value} {done[action]} times, planned {planned[action]} times"
                )


def _planned(subject: Subject, index: int, call: CallRecord) -> Iterator[Action | Open]:
    """Yield what the plan has at a target in a call that reaches it."""
    plan = subject.plan
    row, bound = plan.rows[call.row.step], plan.assignments[index]
    if call.dropped or bound.denoiser != call.denoiser:
        return
    around = (other for other in range(len(row.actions)) if plan.covers(other, index))
    if not any(row.actions[other] is Action.REUSE for other in around):
        yield row.actions[index]


def check_composes(subject: Subject) -> None:
    """Beside other policies it runs, in any order of the specs, or is refused in one line; removed, nothing stays."""
    partners = list(_partners(subject))
    if not partners:
        raise NotApplicableError("no other policy acts on this model")
    for partner in partners:
        try:
            images = [_drawn_with(subject, order) for order in ([*subject.policies, partner],
                                                                [partner, *subject.policies])]  # fmt: skip
        except PolicyError:
            raise
        except CachekitError as error:
            images = []
            if not str(error):
                raise CheckFailedError(f"refused beside {partner} without a reason") from None
        if images:
            require_same_image(images[1], images[0], f"beside {partner}, the image depends on the order of the specs")
            if not bool(images[0].isfinite().all()):
                raise CheckFailedError(f"beside {partner}, the image holds NaN or inf")
        undone = subject.draw_removed(subject.call)
        expected = subject.uncached(subject.call)
        require_same_image(undone, expected, f"removed with {partner}, the image differs from the uncached one")


def _partners(subject: Subject) -> Iterator[Policy]:
    present = {policy.name for policy in subject.policies}
    for spec in PARTNERS:
        name = spec.partition(":")[0]
        if name in subject.catalog.policies and name not in present:
            partner = parse(spec, subject.catalog)
            try:
                with apply(subject.pipe, partner, catalog=subject.catalog):
                    pass
            except (SiteError, GuidanceError):
                continue
            yield partner


def _drawn_with(subject: Subject, policies: list[Policy]) -> torch.Tensor:
    with apply(subject.pipe, policies, catalog=subject.catalog):
        return drawn(subject.pipe, subject.call.arguments(subject.model, subject.pipe))
