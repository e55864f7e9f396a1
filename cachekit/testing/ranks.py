"""The check that processes which share an image agree."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

from torch import distributed

from cachekit.applying import apply
from cachekit.attaching.attachment import Attachment
from cachekit.interface.moment import Action, Open
from cachekit.runs.record import CallRecord
from cachekit.testing.models import Call
from cachekit.testing.results import CheckFailedError, NotApplicableError
from cachekit.testing.subject import Subject
from cachekit.testing.tiny.calls import drawn
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
    ranks = _drawn(subject, (subject.call, replace(subject.call, seed=7, positive=8, negative=9)))
    own = next((rank.error for rank in ranks if rank.error and not isinstance(rank.error, RuntimeError)), None)
    if own is not None:
        raise own
    one, other = ([(call.row.step, list(call.row.actions), call.row.branches) for call in rank.calls] for rank in ranks)
    for (step, mine, branches), (_, theirs, others) in zip(one, other):
        if mine != theirs or branches != others:
            raise CheckFailedError(f"two processes part in step {step}{_place(subject, mine, theirs)}")
    if ranks[0].error or ranks[1].error:
        raise CheckFailedError("two processes wait for each other") from ranks[0].error or ranks[1].error


def _place(subject: Subject, mine: Sequence[Action | Open], theirs: Sequence[Action | Open]) -> str:
    """Name the first target at which the actions differ."""
    for bound, one, other in zip(subject.plan.assignments, mine, theirs):
        if one is not other:
            done, instead = (action.value for action in (one, other))
            return f": {bound.target.name!r} is {done} in one and {instead} in the other"
    return ": other branches run"


class _Rank(threading.Thread):
    """A thread that draws as one of the processes which share an image: its calls, and what it raised."""

    def __init__(self, subject: Subject, attachment: Attachment, pipe: Any, call: Call, group: Any) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.calls: Sequence[CallRecord] = ()
        self._attachment, self._pipe, self._group = attachment, pipe, group
        self._given = call.arguments(subject.model, pipe)

    def run(self) -> None:
        try:
            with sharing(denoiser_of(self._pipe), self._group()):
                drawn(self._pipe, self._given)
        except Exception as error:  # noqa: BLE001 - the check raises it
            self.error = error
        self.calls = self._attachment.report().record.calls


def _drawn(subject: Subject, calls: Sequence[Call]) -> list[_Rank]:
    """Draw at once, each rank its own call."""
    meeting = distributed.HashStore()  # type: ignore[attr-defined]
    with ExitStack() as stack:
        ranks = []
        for number, call in enumerate(calls):
            pipe, policies = subject.model.make(), copy.deepcopy(subject.policies)
            attachment = stack.enter_context(apply(pipe, policies, catalog=subject.catalog))
            group = partial(distributed.ProcessGroupGloo, meeting, number, len(calls), _PATIENCE)
            ranks.append(_Rank(subject, attachment, pipe, call, group))
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    return ranks
