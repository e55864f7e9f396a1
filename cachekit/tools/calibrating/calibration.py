"""Calibrations: the weights of each step, what they were made for, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from cachekit.errors import CalibrationError, reason_of
from cachekit.files import write_whole
from cachekit.tools.calibrating.fits import Figures, Fit, Weights
from cachekit.tools.calibrating.key import Key, Numbers
from cachekit.tools.calibrating.terms import misfit, misfit_of_weights
from cachekit.upstream import versions as upstream

#: The version of the file.
VERSION = 1
#: Where the calibrations of the embedded models are; `benchmarks/calibrations.py` makes them.
FOLDER = Path(__file__).parents[2] / "models" / "demo" / "calibrations"


class Calibration(Numbers):
    """Weights for one model, scheduler, number of steps and schedule, at one guidance scale or several.

        calibration = cachekit.calibrate(pipe, "calibrated:interval=4", prompts, num_inference_steps=25)
        calibration.save("weights.json")
        cachekit.apply(pipe, "calibrated:file=weights.json")

    `fits` has a set of weights for each scale, in order, or of figures for parts of policies that measure their own.
    `reference_steps` is the number of steps of the uncached run that was the target.
    """

    version: int = VERSION
    key: Key
    reference_steps: int = Field(ge=1)
    versions: dict[str, str] = Field(default_factory=dict)
    fits: Annotated[list[Fit], Field(min_length=1)] | Annotated[list[Figures], Field(min_length=1)]

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        problem = misfit(self.key, self.fits)
        if not problem and isinstance(self.fits[0], Fit):
            problem = misfit_of_weights(self.key, self.fits[0].terms)
        if problem:
            raise ValueError(problem)
        return self

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield what a line shows of it: not the weights."""
        yield from ((name, getattr(self.key, name)) for name in ("model", "scheduler", "steps", "schedule"))
        yield "scales", self.scales

    # -- files --------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration as JSON, in one piece: an interrupted call leaves the file as it was.

        Raises `CalibrationError` where it can't be written.
        """
        write_whole(path, self.model_dump_json(), CalibrationError)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read and check a calibration; raises `CalibrationError` where anything about it is wrong."""
        name = os.fspath(path)
        try:
            data = json.loads(Path(path).read_text())
        except OSError as error:
            raise CalibrationError(f"cannot read {name!r}: {error.strerror}; make it with cachekit calibrate") from None
        except ValueError as error:
            raise CalibrationError(f"{name!r} is not a complete calibration file: {error}; make it again") from None
        found = data.get("version") if isinstance(data, dict) else None
        if found != VERSION:
            raise CalibrationError(f"{name!r} has version {found!r}, this cachekit reads {VERSION}; make it again")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            # Which of the two kinds of fits was tried is left out.
            where = ".".join(part for part in map(str, first["loc"]) if "list" not in part) or "calibration"
            raise CalibrationError(f"{name!r}: {where}: {reason_of(first)}; make it again") from None

    @classmethod
    def merge(cls, first: Calibration, *others: Calibration) -> Calibration:
        """Put calibrations of the same thing together: sets for other scales, and sums of the same scale added.

        Raises `CalibrationError` where one was made for something else.
        """
        fits: dict[float, Any] = {fit.guidance: fit for fit in first.fits}
        for other in others:
            difference = first.key.difference(other.key)
            if not difference and first.reference_steps != other.reference_steps:
                difference = f"reference steps {first.reference_steps}, not {other.reference_steps}"
            if difference:
                raise CalibrationError(
                    f"calibrations to merge differ: {difference}; merge calibrations with the same settings"
                )
            for fit in other.fits:
                fits[fit.guidance] = fits[fit.guidance].plus(fit) if fit.guidance in fits else fit
        # Not a copy, which would have the figures of the first.
        of_all = [fits[scale] for scale in sorted(fits)]
        return cls(key=first.key, reference_steps=first.reference_steps, versions=first.versions, fits=of_all)

    # -- use ----------------------------------------------------------------------------------------------

    @property
    def scales(self) -> list[float]:
        """The guidance scales, in order."""
        return [fit.guidance for fit in self.fits]

    def refuse_others(self, key: Key, source: str) -> None:
        """Raise `CalibrationError` where the calibration, which was read from `source`, wasn't made for `key`."""
        difference = key.difference(self.key)
        if key.is_widened(self.key):
            raise CalibrationError(
                f"{source}: the run has {difference}: another policy adds steps; leave it out, or use what=linear,"
                " which has no weights"
            )
        if difference:
            raise CalibrationError(f"{source}: the run has {difference}; calibrate for it with cachekit calibrate")

    def weights_at(self, guidance: float, source: str) -> Sequence[Weights]:
        """Find the weights of each step at a guidance scale, on the line between the scales around it.

        Raises `CalibrationError` outside of the scales.
        """
        steps: dict[float, list[Weights]] = {
            fit.guidance: [step.weights for step in fit.steps] for fit in self.fits if isinstance(fit, Fit)
        }
        for scale, found in steps.items():
            if abs(scale - guidance) < 1e-6:
                return found
        for low, high in pairwise(steps):
            if low < guidance < high:
                share = (guidance - low) / (high - low)
                return [_between(one, two, share) for one, two in zip(steps[low], steps[high])]
        raise self._outside(guidance, source)

    @cached_property
    def figures(self) -> list[dict[str, float]]:
        """The mean of each figure over all scales, in each step; none where the calibration has weights."""
        fits = [fit for fit in self.fits if isinstance(fit, Figures)]
        steps = zip(*(fit.steps for fit in fits))
        return [{name: sum(one[name].value for one in same) / len(same) for name in same[0]} for same in steps]

    def refuse_guidance(self, guidance: float, source: str) -> None:
        """Raise `CalibrationError` for a guidance scale below or above those measured."""
        if not self.scales[0] - 1e-6 <= guidance <= self.scales[-1] + 1e-6:
            raise self._outside(guidance, source)

    def _outside(self, guidance: float, source: str) -> CalibrationError:
        scales = " to ".join(f"{scale:g}" for scale in dict.fromkeys((self.scales[0], self.scales[-1])))
        return CalibrationError(
            f"{source}: the run has guidance scale {guidance:g}, not {scales}; calibrate at it with cachekit calibrate"
        )


@lru_cache(maxsize=64)
def _read(path: str, changed: int) -> Calibration:
    return Calibration.load(path)


def read(path: str) -> Calibration:
    """Load a calibration, or take the one loaded before if the file is unchanged since."""
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError:
        changed = 0
    return _read(path, changed)


def _between(one: Weights, two: Weights, share: float) -> Weights:
    return {name: (1 - share) * weight + share * two[name] for name, weight in one.items()}


def versions() -> dict[str, str]:
    """Collect the versions that a calibration was made with."""
    from cachekit.version import __version__

    return {"cachekit": __version__, **upstream.versions()}


def path_of(key: Key) -> Path:
    """Name the file of a calibration that ships."""
    return _path(key.model, key.scheduler, key.steps, len(key.full))


def ships(model: str, scheduler: str, steps: int, full: Sequence[int], scale: float | None) -> bool:
    """Whether a calibration ships for a run of a model with this digest: its steps, those in full, its guidance."""
    path = _path(model, scheduler, steps, len(full))
    if scale is None or not model or not _serves(path, full):
        return False
    served = read(str(path)).scales
    return served[0] <= scale <= served[-1]


def _path(model: str, scheduler: str, steps: int, full: int | str) -> Path:
    return FOLDER / f"{model}-{scheduler.removesuffix('Scheduler').lower()}-{steps}-{full}.json"


def _serves(path: Path, full: Sequence[int]) -> bool:
    """Whether a file is there, and for these full steps: its name has their number alone."""
    return path.is_file() and read(str(path)).key.full == list(full)


def shipped(key: Key) -> str:
    """Find the calibration that ships for a run.

    Raises `CalibrationError` where there is none.
    """
    path = path_of(key)
    if _serves(path, key.full):
        return str(path)
    all_intervals = _path(key.model, key.scheduler, key.steps, "*")
    if any(key.is_widened(read(str(other)).key) for other in FOLDER.glob(all_intervals.name)):
        raise CalibrationError(
            f"no calibration ships for full steps {';'.join(map(str, key.full))}: another policy adds steps to those of"
            f" {key.schedule}; leave it out, or use what=linear, which has no weights"
        )
    raise CalibrationError(
        f"no calibration ships for {key.schedule}, model {key.model}, {key.scheduler} and {key.steps} steps; make one"
        " with cachekit calibrate and give it as file="
    )
