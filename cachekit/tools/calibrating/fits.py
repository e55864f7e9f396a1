"""What a calibration holds for one guidance scale: the weights of each step, or figures of uncached runs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field, model_validator
from typing_extensions import Self

from cachekit.tools.calibrating.key import Numbers
from cachekit.tools.calibrating.sums import Sums

#: Weights of a step, by the name of the term.
Weights = Mapping[str, float]


class StepFit(Numbers):
    """One step: its weights by term, the error they leave, and the sums that they were solved from.

    `products` has the rows of the lower triangle, `error` is relative to the root mean square of what was wanted.
    """

    weights: dict[str, float] = Field(min_length=1)
    error: float = Field(ge=0)
    products: list[list[float]]
    targets: list[float]
    square: float = Field(ge=0)
    elements: int = Field(ge=1)

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        sizes = [len(row) for row in self.products]
        if sizes != list(range(1, len(self.weights) + 1)) or len(self.targets) != len(self.weights):
            raise ValueError(f"{len(self.weights)} weights, but sums of other sizes")
        return self

    @classmethod
    def of(cls, sums: Sums) -> Self:
        """Solve sums."""
        weights = sums.solve()
        rows = [row[: place + 1] for place, row in enumerate(sums.products.tolist())]
        return cls(
            weights=dict(zip(sums.names, weights.tolist())),
            error=sums.error(weights),
            products=rows,
            targets=sums.targets.tolist(),
            square=sums.square,
            elements=sums.elements,
        )

    @property
    def sums(self) -> Sums:
        """The sums, to which others can be added."""
        lower = np.zeros((len(self.weights),) * 2)
        for place, row in enumerate(self.products):
            lower[place, : place + 1] = row
        whole = lower + np.tril(lower, -1).T
        return Sums(tuple(self.weights), whole, np.array(self.targets), self.square, self.elements)


class Fit(Numbers):
    """The steps of one guidance scale; `runs` counts the calibrations whose sums were added.

    Separate runs follow trajectories of their own, so their sums add up only nearly.
    """

    guidance: float
    prompts: int = Field(ge=1)
    runs: int = Field(default=1, ge=1)
    steps: list[StepFit]

    def plus(self, other: Fit) -> Fit:
        """Add the sums of another run at the same scale, and solve anew."""
        steps = [StepFit.of(one.sums + two.sums) for one, two in zip(self.steps, other.steps)]
        return Fit(
            guidance=self.guidance, prompts=self.prompts + other.prompts, runs=self.runs + other.runs, steps=steps
        )

    @property
    def terms(self) -> list[frozenset[str]]:
        """The names of each step's terms."""
        return [frozenset(step.weights) for step in self.steps]


class Mean(Numbers):
    """The sum of a figure over `count` images."""

    total: float
    count: int = Field(ge=1)

    def __add__(self, other: Mean) -> Mean:
        """Add the sum over other images."""
        return Mean(total=self.total + other.total, count=self.count + other.count)

    @property
    def value(self) -> float:
        """The mean."""
        return self.total / self.count


class Figures(Numbers):
    """What a part of a policy measures of uncached runs at one guidance scale: its figures by name, in each step.

    `runs` counts the calibrations whose figures were added.
    """

    guidance: float
    prompts: int = Field(ge=1)
    runs: int = Field(default=1, ge=1)
    steps: list[dict[str, Mean]]

    def plus(self, other: Figures) -> Figures:
        """Add the figures of another run: each counts by its number of images, and so do runs merged before."""
        steps = [_added(one, two) for one, two in zip(self.steps, other.steps)]
        return Figures(
            guidance=self.guidance, prompts=self.prompts + other.prompts, runs=self.runs + other.runs, steps=steps
        )

    @property
    def terms(self) -> list[frozenset[str]]:
        """The names of each step."""
        return [frozenset(step) for step in self.steps]


def _added(one: Mapping[str, Mean], two: Mapping[str, Mean]) -> dict[str, Mean]:
    both = {name: mean + two[name] for name, mean in one.items() if name in two}
    return {**one, **two, **both}
