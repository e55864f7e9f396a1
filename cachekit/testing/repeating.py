"""Checks that compare whole images: undone, repeated, interrupted, resized, copied, compiled, in threads."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import torch

from cachekit.attaching.removal import remove
from cachekit.errors import CachekitError
from cachekit.testing.models import Call, twin
from cachekit.testing.places import first_not_finite, reused
from cachekit.testing.results import CheckFailedError, NotApplicableError
from cachekit.testing.steering import steered
from cachekit.testing.subject import CachedRun, Subject, distance, far, require_same
from cachekit.testing.tiny.calls import drawn
from cachekit.upstream.calling import on_step_end
from cachekit.upstream.pipelines import denoiser_of

#: Compiled code may fuse operations that are rounded apart otherwise.
_ROUNDING = 1e-4


def check_runs(subject: Subject) -> None:
    """A run ends without an error, and its image has no NaN or inf."""
    if not bool(subject.first.image.isfinite().all()):
        raise CheckFailedError(f"the image holds NaN or inf{first_not_finite(subject.first.predictions)}")


def check_differs(subject: Subject) -> None:
    """Where something is reused, the image differs from the uncached one."""
    if not subject.reuses:
        raise NotApplicableError(f"nothing is reused in {subject.steps} steps")
    if torch.equal(subject.first.image, subject.uncached(subject.call)):
        record = subject.first.report.record
        place = reused(subject.plan.assignments, record, range(subject.steps))
        raise CheckFailedError(f"the image equals the uncached one, though outputs were reused, first {place}")


def check_noop_is_exact(subject: Subject) -> None:
    """Attached but paused, the image equals the uncached one to the bit."""
    with subject.applied() as attachment:
        subject.draw(attachment, subject.call)
        with attachment.paused():
            found = subject.draw_removed(subject.call)
            subject.require_uncached(found, subject.call, "paused, the image differs from the uncached one")


def check_undo(subject: Subject) -> None:
    """Removed, the image equals the uncached one to the bit."""
    subject.draw_fresh(subject.call)
    found = subject.draw_removed(subject.call)
    subject.require_uncached(found, subject.call, "removed, the image differs from the uncached one")


def check_again(subject: Subject) -> None:
    """Two runs in a row are equal to the bit, and so is one after the policy was removed and applied again."""
    with subject.applied() as attachment:
        found = [subject.draw(attachment, subject.call) for _ in range(2)]
    require_same(found[1], found[0], "a second run differs from the first")
    require_same(subject.draw_fresh(subject.call), subject.first, "applied again, the image differs")


def check_second_image_is_independent(subject: Subject) -> None:
    """An image doesn't depend on the ones drawn before it with other prompts and other noise."""
    with subject.applied() as attachment:
        subject.draw(attachment, replace(subject.call, seed=7, positive=8, negative=9))
        found = subject.draw(attachment, subject.call)
    require_same(found, subject.first, "after an image of another prompt, the image differs")


class _StopError(Exception):
    """Raised by a callback of a step."""


def check_interrupt(subject: Subject) -> None:
    """After a run that an exception ended halfway, the next one equals a fresh one."""
    with subject.applied() as attachment:
        try:
            subject.draw(attachment, subject.call, **_stopping(subject.pipe, subject.steps // 2))
        except _StopError:
            pass
        else:
            raise NotApplicableError("the pipeline didn't call the callback")
        found = subject.draw(attachment, subject.call)
    require_same(found, subject.first, "after an interrupted run, the image differs")


def _stopping(pipe: Any, at: int) -> dict[str, Any]:
    """Make the argument by which a pipeline raises `_StopError` at the end of step `at`."""

    def stop(step: int) -> None:
        if step == at:
            raise _StopError

    return on_step_end(pipe, stop)


def check_shape_change(subject: Subject) -> None:
    """An image of another size, and one of the first size after it, equal those of fresh runs."""
    resized = replace(subject.call, resized=True)
    with subject.applied() as attachment:
        found = [subject.draw(attachment, call) for call in (subject.call, resized, subject.call)]
    require_same(found[1], subject.draw_fresh(resized), "of another size, the image differs from that of a fresh run")
    require_same(found[2], subject.first, "after an image of another size, the image differs")


def check_threads(subject: Subject) -> None:
    """Runs in several threads, of pipelines that share a denoiser, don't disturb each other."""
    calls = [replace(subject.call, seed=seed) for seed in (0, 5)]
    found: dict[int, CachedRun | Exception] = {}

    def draw(call: Call, pipe: Any) -> None:
        try:
            found[call.seed] = subject.draw(attachment, call, pipe)
        except Exception as error:  # noqa: BLE001 - raised again below
            found[call.seed] = error

    with subject.applied() as attachment:
        threads = [threading.Thread(target=draw, args=(call, twin(subject.pipe))) for call in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for call in calls:
        one = found[call.seed]
        if isinstance(one, Exception):
            raise one
        expected = subject.first if call == subject.call else subject.draw_fresh(call)
        require_same(one, expected, "in a thread beside another, the image differs")


def check_deepcopy(subject: Subject) -> None:
    """A deep copy of the pipeline is cached like the original, and can be undone alone."""
    with subject.applied() as attachment:
        subject.draw(attachment, subject.call)
        copied = copy.deepcopy(subject.pipe)
        given = subject.call.arguments
        image = drawn(copied, given(subject.model, copied))
        if not torch.equal(image, subject.first.image):
            where = subject.parting(copied, subject.pipe, subject.call)
            raise CheckFailedError(f"a deep copy's image differs (by {far(image, subject.first.image)}){where}")
        remove(copied)
        undone = drawn(copied, given(subject.model, copied))
        subject.require_uncached(undone, subject.call, "undone, a deep copy's differs from the uncached", copied)
        found = subject.draw(attachment, subject.call)
    require_same(found, subject.first, "after a deep copy was made, the image differs")


def check_compiled(subject: Subject) -> None:
    """With its denoiser compiled, a run gives what it gives uncompiled."""
    if subject.model.small is None:
        raise NotApplicableError("compiled on sd and pixart alone, to save time")
    pipe, expected = _uncompiled(subject, subject.model.small())
    torch._dynamo.reset()
    denoiser_of(pipe).compile(backend="eager")
    try:
        found, taken = _outputs(subject, pipe)
    finally:
        torch._dynamo.reset()
    for step, (one, other) in enumerate(zip(found, expected)):
        if distance(one, other) > _ROUNDING:
            raise CheckFailedError(
                f"compiled, what the denoiser gives in step {step} differs by {far(one, other)};"
                f" reused is {taken[step] or 'nothing'}"
            )


def _uncompiled(subject: Subject, pipe: Any) -> tuple[Any, list[torch.Tensor]]:
    """Draw with a smaller pipeline, or with the model's own where that has what the policy acts on or was made for."""
    try:
        return pipe, _outputs(subject, pipe)[0]
    except CachekitError:
        pipe = subject.model.make()
        return pipe, _outputs(subject, pipe)[0]


def _outputs(subject: Subject, pipe: Any) -> tuple[list[torch.Tensor], list[str]]:
    """Draw, with nothing watched; the guided output of each step, and what is reused in it."""
    with subject.applied(pipe, plain=True) as attachment, steered(pipe) as outputs:
        drawn(pipe, subject.call.arguments(subject.model, pipe))
        record = attachment.report().record
        return outputs, [reused(attachment.setup.assignments, record, [step]) for step in range(len(outputs))]
