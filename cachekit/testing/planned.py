"""Checks of schedules and plans: what is announced happens, and can be combined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from cachekit.applying import apply
from cachekit.errors import CachekitError, GuidanceError, PolicyError, SiteError
from cachekit.interface.moment import Action, Moment, Open, Time
from cachekit.interface.parts import BranchChange
from cachekit.interface.policy import Policy
from cachekit.interface.specs import parse
from cachekit.planning.assignments import Assignment
from cachekit.planning.plan import Plan
from cachekit.runs.record import CallRecord
from cachekit.testing.places import first_not_finite
from cachekit.testing.results import CheckFailedError, NotApplicableError
from cachekit.testing.subject import CachedRun, Subject, require_same

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
    for index, bound in enumerate(subject.plan.assignments):
        _refuse_misses(subject, index)
        (_compare_narrowing if bound.is_guidance else _compare_counts)(subject, index)


def _refuse_misses(subject: Subject, index: int) -> None:
    record, plan = subject.first.report.record, subject.plan
    if record.missed[index]:
        steps = [call.row.step for call in record.calls if _is_miss(plan, index, call)]
        name, where = plan.assignments[index].target.name, f", first in step {steps[0]}" if steps else ""
        raise CheckFailedError(f"{record.missed[index]} of the reuses of {name!r} found nothing kept{where}")


def _compare_narrowing(subject: Subject, index: int) -> None:
    """Raise `CheckFailedError` where a branch is dropped that wasn't planned to be, or the reverse."""
    steps = [row.step for row in subject.plan.rows if row.narrowed_by == index]
    if bool(steps) != bool(subject.first.report.record.counts[index][Action.REUSE]):
        planned = f"a branch in step {steps[0]}" if steps else "no branch"
        raise CheckFailedError(f"the plan drops {planned}, the run does otherwise")


def _compare_counts(subject: Subject, index: int) -> None:
    record, plan = subject.first.report.record, subject.plan
    planned = Counter(action for call in record.calls for action in _planned(subject, index, call))
    for action, done in record.counts[index].items():
        if done != planned[action]:
            steps = [row.step for row in plan.rows if row.actions[index] is action]
            raise CheckFailedError(
                f"{plan.assignments[index].target.name!r}: {action.value} {done} times, planned {planned[action]} times"
                f" {f'from step {steps[0]}' if steps else 'in no step'}"
            )


def _is_miss(plan: Plan, index: int, call: CallRecord) -> bool:
    """Whether a call computed and kept a target where a reuse was planned."""
    return plan.rows[call.row.step].actions[index] is Action.REUSE and call.row.actions[index] is Action.STORE


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
            found = [_drawn_with(subject, after=[partner]), _drawn_with(subject, before=[partner])]
        except PolicyError:
            raise
        except CachekitError as error:
            found = []
            if not str(error):
                raise CheckFailedError(f"refused beside {partner} without a reason") from None
        if found:
            require_same(found[1], found[0], f"beside {partner}, the image depends on the order of the specs")
            if not bool(found[0].image.isfinite().all()):
                where = first_not_finite(found[0].predictions)
                raise CheckFailedError(f"beside {partner}, the image holds NaN or inf{where}")
        undone, what = subject.draw_removed(subject.call), f"removed with {partner}"
        subject.require_uncached(undone, subject.call, f"{what}, the image differs from the uncached one")


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


def _drawn_with(subject: Subject, before: Sequence[Policy] = (), after: Sequence[Policy] = ()) -> CachedRun:
    with subject.applied(before=before, after=after) as attachment:
        return subject.draw(attachment, subject.call)
