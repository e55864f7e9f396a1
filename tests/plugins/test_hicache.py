"""HiCache equals a naive replay with the Hermite polynomials of numpy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import factorial

import pytest
import torch
from numpy.polynomial.hermite import hermval
from support import replays
from support.comparisons import ROUNDING, compared

import cachekit

STEPS = 9


def series(order: int, sigma: float) -> replays.Series:
    """Divided differences of the newest value, each times s^m H_m(s x) / m!."""

    def value(steps: Sequence[int], values: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        table = [value.double() for value in values[: order + 1]]
        total = torch.zeros_like(table[0])
        for degree in range(len(table)):
            factor = sigma**degree * hermval(sigma * (step - steps[0]), [0] * degree + [1]) / factorial(degree)
            total = total + float(factor) * table[0]
            gaps = [newer - older for newer, older in itertools.pairwise(steps)]
            table = [(a - b) / gap for (a, b), gap in zip(itertools.pairwise(table), gaps)]
        return total

    return value


@compared("hicache", "a replay", "name", ROUNDING)
@pytest.mark.parametrize(
    ("name", "spec", "full", "order", "sigma"),
    [
        ("pixart", "hicache:interval=2", [0, 1, 2, 4, 6, 8], 2, 0.5),
        ("sd3", "hicache:interval=3,order=1,sigma=0.7", [0, 1, 2, 5, 8], 1, 0.7),
        ("flux", "hicache:interval=3,warm_up=1", [0, 3, 6], 2, 0.5),
        ("wan", "hicache:interval=2,order=3,sigma=0.3", [0, 1, 2, 4, 6, 8], 3, 0.3),
        ("small", "hicache:interval=4,warm_up=2", [0, 1, 5], 2, 0.5),
    ],
)
def test_the_layers_equal_a_replay(name: str, spec: str, full: list[int], order: int, sigma: float) -> None:
    replays.check(name, spec, replays.layers_of, full, series(order, sigma), STEPS)


def test_the_last_block_alone_equals_a_replay() -> None:
    spec = "hicache:at=features,interval=3,sigma=0.6"
    replays.check("flux", spec, replays.features_of, [0, 1, 2, 5, 8], series(2, 0.6), STEPS)


def test_the_series_is_not_taylors() -> None:
    """Half of its slope, at order 1 and the default scale."""
    made = [cachekit.policies()[name](order=1).choices()["layers"].what for name in ("taylorseer", "hicache")]
    times, at = [cachekit.Time(4), cachekit.Time(2)], cachekit.Moment(6, 9, time=cachekit.Time(6))
    assert [what.weights(times, at) for what in made] == [[2.0, -1.0], [1.5, -0.5]]
