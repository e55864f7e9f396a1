"""Spectrum equals a naive replay that fits by least squares, and its schedule the counters of the published code."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, sqrt

import numpy as np
import pytest
import torch
from numpy.polynomial.chebyshev import chebvander
from support import replays, tiny
from support.comparisons import compared

import cachekit
from cachekit import Moment

STEPS = 12


def series(degree: int, ridge: float, mix: float) -> replays.Series:
    def value(steps: Sequence[int], values: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        table = np.stack([value.double().numpy().ravel() for value in values])
        places = 2 * np.array([step, *steps]) / (STEPS - 1) - 1
        (here, *rows) = chebvander(places, degree)
        # Ridge regression as least squares with rows for the penalty.
        padded = np.vstack([rows, sqrt(ridge) * np.eye(degree + 1)])
        wanted = np.vstack([table, np.zeros((degree + 1, table.shape[1]))])
        fitted = here @ np.linalg.lstsq(padded, wanted, rcond=None)[0]
        line = table[0] + (step - steps[0]) / (steps[0] - steps[1]) * (table[0] - table[1])
        return torch.from_numpy(mix * fitted + (1 - mix) * line).reshape(values[0].shape)

    return value


@compared("spectrum", "a replay", "name", "within 0.001")
@pytest.mark.parametrize(
    ("name", "spec", "full", "degree", "ridge", "mix"),
    [
        ("pixart", "spectrum", [0, 1, 2, 3, 4, 6, 8, 11], 4, 0.1, 0.5),
        ("sd3", "spectrum:mix=1,warm_up=3", [0, 1, 2, 4, 6, 9], 4, 0.1, 1),
        ("flux", "spectrum:growth=1.5,warm_up=2,degree=3", [0, 1, 3, 6, 11], 3, 0.1, 0.5),
        ("wan", "spectrum:growth=0,mix=0.8,ridge=0.01,warm_up=2,window=3", [0, 1, 4, 7, 10], 4, 0.01, 0.8),
        ("small", "spectrum:mix=1,warm_up=3,degree=2", [0, 1, 2, 4, 6, 9], 2, 0.1, 1),
        ("sdxl", "spectrum:mix=0.7,warm_up=2", [0, 1, 3, 5, 8], 4, 0.1, 0.7),
    ],
)
def test_equal_to_a_replay(name: str, spec: str, full: list[int], degree: int, ridge: float, mix: float) -> None:
    replays.check(name, spec, replays.features_of, full, series(degree, ridge, mix), STEPS, rtol=1e-3, atol=1e-3)


def published(steps: int, window: float, growth: float, warm_up: int) -> list[int]:
    """Full steps by the counters of the published code."""
    full, cached = [], 0
    for step in range(steps):
        if step >= warm_up and (cached + 1) % floor(window) != 0:
            cached += 1
            continue
        if step >= warm_up:
            window = round(window + growth, 3)
        cached = 0
        full.append(step)
    return full


@compared("spectrum", "the counters of the published code: full steps", [], "the same steps")
@pytest.mark.parametrize("warm_up", [1, 5])
@pytest.mark.parametrize(("window", "growth"), [(2, 0.75), (2, 3), (1, 0.1), (3.5, 0), (1.7, 0.3), (2, 0.7)])
def test_the_schedule_has_the_steps_of_the_published_code(window: float, growth: float, warm_up: int) -> None:
    (choice,) = cachekit.policies()["spectrum"](window=window, growth=growth, warm_up=warm_up).choices().values()
    full = [step for step in range(50) if choice.when.full(Moment(step, 50))]
    assert full == published(50, window, growth, warm_up)
    assert [step for step in range(50, 100) if choice.when.full(Moment(step, 100, origin=50))] == [
        50 + step for step in full
    ]


@pytest.mark.parametrize(("growth", "count"), [(0.75, 14), (3, 10)])
def test_how_many_of_50_steps_are_full(growth: float, count: int) -> None:
    (choice,) = cachekit.policies()["spectrum"](growth=growth).choices().values()
    assert sum(choice.when.full(Moment(step, 50)) for step in range(50)) == count


def test_its_parts_serve_other_places() -> None:
    pipe = tiny.small()
    plain = tiny.latents(pipe, steps=STEPS)
    with cachekit.apply(pipe, "cache:where=denoiser,when=growing(first=3),what=spectral(mix=0.5)") as attachment:
        assert not torch.equal(tiny.latents(pipe, steps=STEPS), plain)
        assert replays.full_steps(attachment.plan(STEPS)) == [0, 1, 2, 4, 6, 9]
        assert attachment.report().left_out == STEPS - 6
