"""Skip all blocks while the accumulated change of the modulated input is small (arXiv 2411.19108)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from cachekit import (
    Accumulating,
    Beginning,
    Choice,
    History,
    Measured,
    Modulated,
    Moment,
    Policy,
    Reuse,
    Signal,
    Streams,
    relative_change,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

#: The polynomial that leaves a change as it is.
_IDENTITY = (0.0, 0.0, 0.0, 1.0, 0.0)
_INPUT, _OUTPUT, _COEFFICIENTS = "input", "output", "coefficients"


class TeaCache(Policy):
    """TeaCache: all blocks are skipped while the accumulated estimate of the output's change is small.

    In each step sum += p(|m - m'| / |m'|), with m the modulated input of the first attention, m' that of the step
    before, and p a polynomial. While the sum is below `threshold`, what the blocks added last is added again; otherwise
    they run, and the sum starts from 0. The first and the last step are full.

    `coefficients` are those of p, from the fourth power down to the constant. With `file`, they are fitted to what
    `cachekit calibrate` measured on the model.
    """

    name: ClassVar[str] = "teacache"
    summary: ClassVar[str] = "skip all blocks while the accumulated change of the modulated input is small"
    paper: ClassVar[str] = "arXiv 2411.19108"
    exclusive: ClassVar[tuple[str, ...]] = ("coefficients", "file")

    threshold: float = Field(0.2, ge=0)
    coefficients: tuple[float, ...] = Field(_IDENTITY, min_length=5, max_length=5)
    file: str | None = None

    def choices(self) -> Mapping[str, Choice]:
        """Choose all blocks."""
        keys = ("threshold", "coefficients", "file")
        when = ModulatedChange(first=1, final=1, **{key: getattr(self, key) for key in keys})
        return {"blocks": Choice(Modulated(), when, Reuse(of="residual"))}


class ModulatedChange(Measured, Accumulating):
    """Full where the accumulated polynomial of the signal's change reaches `threshold`."""

    name: ClassVar[str] = "modulated_change"

    coefficients: tuple[float, ...]

    def begin(self, run: Beginning, shared: dict[str, Any]) -> None:
        """Fit the polynomial to a file; raises `CalibrationError` where it was made for something else."""
        if self.file is not None:
            super().begin(run, shared)
            shared[_COEFFICIENTS] = fitted(self.figures)

    def change(self, new: Tensor, old: Tensor, at: Moment) -> float:
        """Compute the polynomial of the input's change."""
        change, coefficients = relative_change(new, old), at.shared.get(_COEFFICIENTS, self.coefficients)
        return reduce(lambda total, factor: total * change + factor, coefficients, 0.0)

    def measure(self, kept: Streams, history: History, at: Moment, signal: Signal | None) -> Mapping[str, float]:
        """Measure by how much the modulated input and the output of the blocks change from step to step."""
        assert signal is not None, "the place shows one"
        last, at.memory[_INPUT] = at.memory.get(_INPUT), signal.entered[0]
        if last is None or not history:
            return {}
        pairs = {_INPUT: (signal.entered[0], last), _OUTPUT: (kept[0], history[0].tensors[0])}
        return {name: fmean(map(relative_change, new, old)) for name, (new, old) in pairs.items()}


def fitted(figures: Sequence[Mapping[str, float]]) -> tuple[float, ...]:
    """Fit a polynomial to the mean changes of each step: of degree 4, or less for few steps."""
    from numpy import polyfit

    inputs, outputs = ([step[name] for step in figures if name in step] for name in (_INPUT, _OUTPUT))
    return tuple(polyfit(inputs, outputs, min(4, len(inputs) - 1)).tolist())
