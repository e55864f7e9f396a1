"""The stand-in that reads calibrations, and the one that takes its place while they are made."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import PrivateAttr

from cachekit.errors import CalibrationError
from cachekit.interface.beginning import Beginning
from cachekit.interface.moment import History, Moment, Streams
from cachekit.interface.parts import StandIn, combine
from cachekit.tools.calibrating.terms import AGES, FRESH, SAMPLE

if TYPE_CHECKING:
    from torch import Tensor

    from cachekit.tools.calibrating.fits import Weights

#: Terms `(batch, channels, ...)` by name: an age and a branch such as "last.cond", or "sample".
Terms = dict[str, "Tensor"]
#: Where a run's weights are in the memory that its policy shares.
_WEIGHTS = "weights"


class Calibrated(StandIn):
    """A weighted sum of the last two outputs of each guidance branch and the sample, with weights from a file.

    Computed outputs are corrected too: by a weighted sum with themselves in it. `file` is a calibration made by
    `cachekit calibrate`; without one, those that ship are looked through. Where branches share a batch, each has the
    guided output; where each has a call of its own, it has weights of its own.

    >>> Calibrated(file="weights.json")
    Calibrated(of='output', file='weights.json')
    >>> str(Calibrated())
    'calibrated'
    """

    name: ClassVar[str] = "calibrated"
    summary: ClassVar[str] = "a weighted sum of the last two outputs and the sample, with weights from a file"
    positional: ClassVar[str] = "file"
    length: ClassVar[int | None] = 2
    amends: ClassVar[bool] = True

    of: Literal["output"] = "output"
    file: str | None = None

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Read the weights for a run; raises `CalibrationError` where the file was made for something else.

        Nor does it serve a run in which another policy drops a branch for some steps.
        """
        from cachekit.tools.calibrating.calibration import read, shipped
        from cachekit.tools.calibrating.key import guidance_of, key_of

        key = key_of(run)
        source = self.file or shipped(key)
        found = read(source)
        found.refuse_others(key, repr(source))
        for step, branches in enumerate(run.branches):
            if branches != run.layout.order:
                self._refuse_branches(step, branches, f"others have {' and '.join(run.layout.order)}")
        shared[_WEIGHTS] = found.weights_at(guidance_of(run), repr(source))

    def predict(self, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Make a skipped output; where less is kept than the weights are for, after a value not finite, a line."""
        like = line(history, at.step)
        return self._made(like, terms_of(None, history, at.branches, given[0]), at)

    def amend(self, output: Streams, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Correct a computed output; what a value that wasn't finite is missing for stays as it is."""
        return self._made(output, terms_of(output, history, at.branches, given[0]), at)

    def _made(self, like: Streams, terms: Terms, at: Moment) -> Streams:
        weights = self._weights(at)
        if weights and (SAMPLE in weights) != (len(at.branches) > 1):
            self._refuse_branches(at.step, at.branches, "the step before it had other branches")
        if SAMPLE not in weights:
            weights = {name: weight for name, weight in weights.items() if name.endswith(f".{at.branch}")}
            if not weights and self._weights(at):
                self._refuse_branches(at.step, at.branches, "its weights are for others")
        if not weights or not weights.keys() <= terms.keys():
            return like
        return as_output(weighted(terms, weights), like, at.branches)

    def _refuse_branches(self, step: int, branches: Sequence[str], others: str) -> None:
        raise CalibrationError(
            f"{self}: step {step} has {' and '.join(branches)} in its call, {others}; keep guidance as it is throughout"
            " a run"
        )

    def _weights(self, at: Moment) -> Weights:
        """Get the weights of a step; none where costs are counted, which the values don't change."""
        steps = at.shared.get(_WEIGHTS, ())
        return steps[at.step] if at.step < len(steps) else {}


class Seen(NamedTuple):
    """A call during calibration: its branches, its terms, and what was returned for it."""

    branches: tuple[str, ...]
    terms: Terms
    returned: Streams


class Recorder(StandIn):
    """Records the terms of each call in place of `Calibrated`, while the weights are not known.

    What it returns is replaced once the scheduler is called. Each thread has records of its own.
    """

    name: ClassVar[str] = "recorder"
    length: ClassVar[int | None] = 2
    amends: ClassVar[bool] = True

    _local: Any = PrivateAttr(default_factory=threading.local)

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Keep what the run begins with."""
        self._local.run = run
        self._local.seen = []

    @property
    def run(self) -> Beginning:
        """What this thread's run began with."""
        found: Beginning = self._local.run
        return found

    def take(self) -> list[Seen]:
        """Take this thread's calls since the last time."""
        seen, self._local.seen = self._local.seen, []
        return list(seen)

    def predict(self, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Record the terms of a skipped call, and return its newest output."""
        return self._recorded(history[0].tensors, terms_of(None, history, at.branches, given[0]), at)

    def amend(self, output: Streams, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Record the terms of a computed call, and return its output."""
        return self._recorded(output, terms_of(output, history, at.branches, given[0]), at)

    def _recorded(self, output: Streams, terms: Terms, at: Moment) -> Streams:
        # With one value for all branches, whatever a pipeline makes of their difference is that value.
        last = output[0].chunk(len(at.branches))[-1]
        returned = as_output(last, output, at.branches) if len(at.branches) > 1 else output
        self._local.seen.append(Seen(at.branches, terms, returned))
        return returned


def terms_of(output: Streams | None, history: History, branches: Sequence[str], sample: Tensor) -> Terms:
    """Take apart what is known in a call: its own output if it ran, those kept, and its sample.

    All tensors have the branches along dimension 0, and all terms the channels that output and sample share. Branches
    in one batch have one sample.
    """
    kept = [(age, entry.tensors[0]) for age, entry in zip(AGES, history)]
    made = [*([(FRESH, output[0])] if output is not None else []), *kept]
    found: Terms = {}
    for age, tensor in made:
        for branch, part in zip(branches, tensor.chunk(len(branches))):
            found[f"{age}.{branch}"] = shared_part(part, sample)
    found[SAMPLE if len(branches) > 1 else f"{SAMPLE}.{branches[0]}"] = shared_part(
        sample.chunk(len(branches))[0], made[0][1]
    )
    return found


def shared_part(tensor: Tensor, other: Tensor) -> Tensor:
    """Cut a tensor down to the sizes that another has too, but for dimension 0."""
    if tensor.shape[1:] == other.shape[1:]:
        return tensor
    common = [slice(min(sizes)) for sizes in zip(tensor.shape[1:], other.shape[1:])]
    whole = (slice(None), *common)
    return tensor[whole]


def weighted(terms: Terms, weights: Mapping[str, float]) -> Tensor:
    """Add up the terms, each times its weight, in at least single precision."""
    total: Tensor | None = None
    for name, weight in weights.items():
        part = terms[name]
        part = (part.float() if part.element_size() < 4 else part) * weight
        total = part if total is None else total + part
    assert total is not None, "a step has weights"
    return total


def as_output(value: Tensor, like: Streams, branches: Sequence[str]) -> Streams:
    """Put a value into the shared channels of the first tensor of each branch; the rest stays as in `like`."""
    first, *rest = like
    whole = value.to(first.dtype).repeat(len(branches), *[1] * (value.dim() - 1))
    if whole.shape == first.shape:
        return (whole, *rest)
    made = first.clone()
    made[tuple(slice(size) for size in whole.shape)] = whole
    return (made, *rest)


def line(history: History, step: int) -> Streams:
    """Extrapolate the last two entries to a step; repeat the only one."""
    if len(history) < 2:
        return history[0].tensors
    newest, older = history[0].at.step, history[1].at.step
    slope = (step - newest) / (newest - older)
    return combine(history[:2], (1 + slope, -slope))
