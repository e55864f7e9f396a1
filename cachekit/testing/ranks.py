"""The check that processes which share an image agree."""

from __future__ import annotations

import copy
import threading
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from typing import Any

from torch import distributed

from cachekit.applying import apply
from cachekit.attaching.attachment import Attachment
from cachekit.errors import CachekitError
from cachekit.reports.record import Record
from cachekit.testing.models import Call, drawn
from cachekit.testing.results import CheckFailedError, NotApplicableError
from cachekit.testing.subject import Subject
from cachekit.upstream.parallel import sharing
from cachekit.upstream.pipelines import denoiser_of

#: How long one waits for the other before that is a failure.
_PATIENCE = timedelta(seconds=20)


def check_ranks(subject: Subject) -> None:
    """Two processes that share an image take the same actions, whatever each of them sees of it.

    Each is a thread with a pipeline and a gloo process of its own. Both vote as under context parallelism; what they
    see differs more than parts of one image do: they draw images of different prompts.
    """
    if subject.plan.is_static and not any(policy.observes for policy in subject.policies):
        raise NotApplicableError("never decides from values")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        raise NotApplicableError("torch has no gloo")
    calls = (subject.call, replace(subject.call, seed=7, positive=8, negative=9))
    one, other = _records(subject, calls)
    for mine, theirs in zip(one.calls, other.calls):
        if (mine.row.actions, mine.row.branches) != (theirs.row.actions, theirs.row.branches):
            raise CheckFailedError(f"two processes part in step {mine.row.step}{_place(subject, mine.row, theirs.row)}")
    if len(one.calls) != len(other.calls):
        raise CheckFailedError(f"one process makes {len(one.calls)} calls, the other {len(other.calls)}")


def _place(subject: Subject, mine: Any, theirs: Any) -> str:
    bounds = zip(subject.plan.assignments, mine.actions, theirs.actions)
    found = next((each for each in bounds if each[1] is not each[2]), None)
    return f": {found[0].target.name!r} is {found[1].value} in one, {found[2].value} in the other" if found else ""


def _records(subject: Subject, calls: tuple[Call, Call]) -> list[Record]:
    """Draw at once, each rank its own call; raises what one of them raised."""
    meeting, found = distributed.HashStore(), dict[int, Record | Exception]()

    def draw(rank: int, pipe: Any, attachment: Attachment) -> None:
        try:
            group = distributed.ProcessGroupGloo(meeting, rank, len(calls), _PATIENCE)
            with sharing(denoiser_of(pipe), group):
                drawn(pipe, calls[rank].arguments(subject.model, pipe))
            found[rank] = attachment.report().record
        except Exception as error:  # noqa: BLE001 - raised again below
            found[rank] = error

    with ExitStack() as stack:
        pipes = [subject.model.make() for _ in calls]
        policies = [copy.deepcopy(subject.policies) for _ in calls]
        applied = [stack.enter_context(apply(pipe, own, catalog=subject.catalog)) for pipe, own in zip(pipes, policies)]
        threads = [threading.Thread(target=draw, args=each) for each in zip(range(len(calls)), pipes, applied)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return _without_errors([found[rank] for rank in range(len(calls))])


def _without_errors(found: list[Record | Exception]) -> list[Record]:
    """Raise the policy's own error first: the other rank then waits in vain, which is an error too."""
    errors = sorted((one for one in found if isinstance(one, Exception)), key=lambda one: isinstance(one, RuntimeError))
    if errors and (isinstance(errors[0], CachekitError) or not isinstance(errors[0], RuntimeError)):
        raise errors[0]
    if errors:
        raise CheckFailedError(f"two processes wait for each other: {str(errors[0]).partition('. ')[0]}")
    return [one for one in found if isinstance(one, Record)]
