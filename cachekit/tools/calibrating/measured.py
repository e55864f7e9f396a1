"""Parts of policies with figures that were measured on a model, such as how much an output changes in each step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import PrivateAttr

from cachekit.errors import CalibrationError
from cachekit.interface.beginning import Beginning
from cachekit.interface.indicators import Indicator, Signal
from cachekit.interface.moment import History, Moment, Streams
from cachekit.interface.parts import Choice, Part, Quantity, Schedule, StandIn
from cachekit.interface.sites import Region, Target
from cachekit.parts.schedules import Every

if TYPE_CHECKING:
    from cachekit.tools.calibrating.key import Key

#: Where the signal of a call is in the memory of its target, while figures are measured.
_SIGNAL = "signal"


class Measured(Part):
    """Mixin of schedules and stand-ins whose figures `cachekit calibrate` measures in uncached runs.

    `measure` names the figures of one target in one step; the file holds their means over prompts and targets. A
    schedule that computes steps in which the output's norm changes by more than a hundredth:

    >>> class Norms(Measured, Schedule):
    ...     name = "norms"
    ...     def measure(self, kept, history, at, signal):
    ...         norms = [float(streams[0].norm()) for streams in (kept, *(entry.tensors for entry in history))]
    ...         return {"change": abs(norms[0] / norms[1] - 1)} if history else {}
    ...     def full(self, at: Moment) -> bool:
    ...         change = self.figure("change", at)
    ...         return change is None or change > 0.01

    Without a file there are no figures, and every step should be full. `file` refuses runs of another model, scheduler,
    number of steps or guidance scale than it was measured with.
    """

    #: What `measure` is given of a target, and how many earlier ones.
    quantity: ClassVar[Quantity] = "output"
    past: ClassVar[int] = 1

    file: str | None = None

    def measure(self, kept: Streams, history: History, at: Moment, signal: Signal | None) -> Mapping[str, float]:
        """Compute figures of what a target made in a step, means over the images of the batch.

        `kept` is the output, or the residual where `quantity` is that; `history` has those of the steps before, newest
        first. Those of a region come with `hidden_states` first. `signal` is what an indicator's place shows.
        `at.memory` is the target's.
        """
        raise NotImplementedError

    @property
    def figures(self) -> Sequence[Mapping[str, float]]:
        """The means of each step's figures, over all guidance scales of the file; empty without a file.

        Raises `CalibrationError` for a file that can't be read, or has something else.
        """
        from cachekit.tools.calibrating.calibration import read

        if self.file is None:
            return ()
        found = read(self.file)
        if found.key.schedule != self.name:
            raise CalibrationError(
                f"{self.file!r} was made for {found.key.schedule}, not {self.name}; make it with cachekit calibrate"
            )
        return found.figures

    def figure(self, name: str, at: Moment) -> float | None:
        """Find a figure of a step; None where it wasn't measured."""
        figures = self.figures
        return figures[at.step].get(name) if at.step < len(figures) else None

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Raise `CalibrationError` where the file was made for something else than this run."""
        from cachekit.tools.calibrating.calibration import read
        from cachekit.tools.calibrating.key import guidance_of

        if self.file is None:
            raise CalibrationError(f"{self.name} has no figures yet; give file=, made by cachekit calibrate")
        found = read(self.file)
        found.refuse_others(measured_key(run, self.name), repr(self.file))
        found.refuse_guidance(guidance_of(run), repr(self.file))


def measured_key(run: Beginning, name: str) -> Key:
    """Describe what figures are measured for: they hold for any full steps."""
    from cachekit.tools.calibrating.key import key_of

    return key_of(run).model_copy(update={"schedule": name, "full": []})


class Watcher(StandIn):
    """Has a part measure each output of an uncached run."""

    name: ClassVar[str] = "watcher"
    watches: ClassVar[bool] = True

    _part: Measured = PrivateAttr()
    _note: Note = PrivateAttr()

    @classmethod
    def watching(cls, part: Measured, note: Note) -> Watcher:
        """Measure for `part`; each step's figures are passed to `note`."""
        watcher = cls(of=part.quantity)
        watcher._part, watcher._note = part, note
        return watcher

    @property
    def entries(self) -> int | None:
        """The number of entries of the part."""
        return self._part.past

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Note what the run begins with."""
        self._note.run = run

    def watch(self, kept: Streams, history: History, at: Moment) -> None:
        """Measure one output."""
        entries = tuple(entry._replace(tensors=_image_first(entry.tensors, at.target)) for entry in history)
        found = self._part.measure(_image_first(kept, at.target), entries, at, at.memory.get(_SIGNAL))
        images = len(kept[0]) // max(len(at.branches), 1)
        for name, value in found.items():
            self._note.add(at.step, name, float(value), images)

    def predict(self, history: History, at: Moment, given: Streams = ()) -> Streams:
        """Take the newest entry; every step is full, so this isn't asked for."""
        return history[0].tensors


def _image_first(streams: Streams, target: Target | None) -> Streams:
    """Put the streams that a region returns in the order in which signals have them."""
    from cachekit.upstream.attention import image_first  # loads torch

    names = target.streams if isinstance(target, Region) else ()
    if len(names) != len(streams):
        return streams
    return tuple(streams[names.index(name)] for name in image_first(names))


class Shown(Indicator):
    """Every step full, with its signal in the memory of the target."""

    name: ClassVar[str] = "shown"

    def full(self, at: Moment) -> bool:
        """Whether the step is full: each is."""
        return True

    def took(self, signal: Signal, at: Moment, full: bool) -> None:
        """Hold the signal until the target has been measured."""
        at.memory[_SIGNAL] = signal


class Note:
    """Figures by step and name, as sums over images, and what the last run began with."""

    def __init__(self) -> None:
        """Start empty."""
        self.run: Beginning | None = None
        self.totals: defaultdict[tuple[int, str], list[float]] = defaultdict(lambda: [0.0, 0])

    def add(self, step: int, name: str, value: float, images: int) -> None:
        """Add the mean over some images."""
        total = self.totals[step, name]
        total[0] += value * images
        total[1] += images


def watched_choices(choices: Mapping[str, Choice], note: Note) -> dict[str, Choice]:
    """Replace what each choice does by watching an uncached run; choices without figures are left out."""
    found = {}
    for name, choice in choices.items():
        part = next((part for part in (choice.when, choice.what) if isinstance(part, Measured)), None)
        if part is not None:
            when: Schedule = Shown() if isinstance(choice.when, Indicator) else Every(n=1)
            found[name] = choice.with_parts(when=when, what=Watcher.watching(part, note))
    return found
