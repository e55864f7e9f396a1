"""Schedules: their full steps in a run, in one that has started anew, and what they do in between."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachekit import OPEN, Action, After, Every, Mask, Moment, Quadratic, SpecError, Time, Window, ends_row

MARKS = {"compute": ".", "store": "S", "reuse": "r"}


def marks(schedule, steps, origin=0, times=None):
    """Write a mark for each step from `origin` on."""
    moments = [Moment(step, steps, origin, times[step] if times else Time(step)) for step in range(origin, steps)]
    return "".join(MARKS[schedule.action(at).value] for at in moments)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Every(n=1), "SSSSSSSSSS"),
        (Every(n=3), "SrrSrrSrrS"),
        (Every(n=3, first=3), "SSSrrSrrSr"),
        (Every(n=4, last=True), "SrrrSrrrSS"),
        (Every(n=3, start=2), "SSSrrSrrSr"),
        (Every(n=20), "Srrrrrrrrr"),
        (After(m=0), "rrrrrrrrrr"),
        (After(m=4), "SSSSrrrrrr"),
        (After(m=40), "SSSSSSSSSS"),
        (Mask(steps=(0, 1, 4)), "SSrrSrrrrr"),
        (Mask(steps=(3, 50)), "SrrSrrrrrr"),
        (Window(first=2, stop=7, when=Every(n=3)), "S.rSrrS..S"),
        (Window(first=2, stop=7, fresh=True, when=Every(n=3)), "SSrSrrSSSS"),
        (Window(when=Every(n=3)), "SrrSrrSrrS"),
        (Window(first=4, when=After(m=2)), "SS..rrrrrr"),
        (Window(stop=0, when=Every(n=3)), "S..S..S..S"),
        (Window(first=1, stop=8, when=Window(first=3, stop=6, when=Every(n=4))), "S..rSr..S."),
    ],
)
def test_what_happens_in_each_step(schedule, expected):
    assert marks(schedule, 10) == expected


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Every(n=3), "SrrSrr"),
        (Every(n=3, first=2), "SSrrSr"),
        (Every(n=3, start=6), "SSSrrS"),  # not before `start`, wherever it starts anew
        (After(m=6), "SSrrrr"),  # a gate stays where it is
        (Mask(steps=(0, 5, 9)), "SSrrrS"),  # its first step, and the listed ones
        (Quadratic(n=5, center=5), "SSrrrr"),
    ],
)
def test_a_schedule_that_starts_anew_at_step_4(schedule, expected):
    assert marks(schedule, 10, origin=4) == expected


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 60))
@settings(deadline=None)
def test_every_has_the_first_and_the_last_step_and_equal_gaps(n, first, steps):
    full = [step for step in range(steps) if Every(n=n, first=first, last=True).full(Moment(step, steps))]
    assert full[0] == 0
    assert full[-1] == steps - 1
    assert full[:first] == list(range(min(first, steps)))
    gaps = [after - before for before, after in itertools.pairwise(full)]
    assert set(gaps[first - 1 : -1]) <= {n}
    assert all(gap <= n for gap in gaps)


# -- windows of timesteps --------------------------------------------------------------------------------------

TIMES = [Time(step, timestep=float(timestep)) for step, timestep in enumerate(range(900, -1, -100))]


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"low": 300.0, "high": 700.0}, "S.S.SrS.S."),
        ({"low": 250.0, "high": 750.0}, "S.SrSrSrS."),
        ({"high": 750.0}, "S.SrSrSrSr"),
        ({"low": 250.0}, "SrSrSrS.S."),
        ({"low": 250.0, "first": 4}, "S.S.SrS.S."),
        ({"low": 250.0, "stop": 4}, "SrSrS.S.S."),
    ],
)
def test_a_window_by_timesteps(bounds, expected):
    window = Window(when=Every(n=2), **bounds)
    inside = [
        bounds.get("low", -1) < time.timestep < bounds.get("high", 1000)
        and bounds.get("first", 0) <= time.step < bounds.get("stop", 10)
        for time in TIMES
    ]
    assert [window.holds(Moment(time.step, 10, time=time)) for time in TIMES] == inside
    wanted = "".join("S" if step % 2 == 0 else "r" if held else "." for step, held in enumerate(inside))
    assert marks(window, 10, times=TIMES) == wanted


def test_a_window_of_timesteps_is_open_without_a_scheduler():
    window = Window(low=0.0, when=Every(n=2))
    assert [window.action(Moment(step, 4)) for step in range(4)] == [Action.STORE, OPEN] * 2
    assert window.decide(Moment(1, 4)) is Action.COMPUTE


def test_a_window_is_full_where_its_schedule_is_not_in_use():
    window = Window(first=2, stop=5, when=Every(n=2))
    assert [window.full(Moment(step, 6)) for step in range(6)] == [True, True, True, False, True, True]


# -- masks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [(), (-1,), (2, 1), (1, 1)])
def test_a_mask_has_each_step_once_and_in_order(steps):
    with pytest.raises(SpecError, match="Mask: "):
        Mask(steps=steps)


# -- DeepCache's schedule --------------------------------------------------------------------------------------


def published(n, center, power, steps):
    """Compute the full steps of DeepCache's non-uniform 1:N schedule: places with equal gaps, then their powers."""

    def root(value, power):
        return np.sign(value) * np.abs(value) ** (1 / power)

    places = np.linspace(root(-center, power), root(steps - center, power), -(-steps // n) + 1)[:-1]
    return {0, *np.trunc(np.round(center + root(places, 1 / power), 9)).astype(int).tolist()}


@pytest.mark.parametrize(
    ("n", "center", "power", "steps"),
    list(itertools.product([1, 2, 3, 5, 10], [0, 10, 15, 40], [1.0, 1.2, 1.4], [1, 20, 25, 50])),
)
def test_the_quadratic_schedule_is_the_published_one(n, center, power, steps):
    schedule = Quadratic(n=n, center=center, power=power)
    near = list(schedule.full_steps(steps) ^ published(n, center, power, steps))
    # A place that is a whole number but for rounding may fall on either side of it.
    assert len(near) <= 2
    assert all(near[0] - 1 <= step <= near[0] + 1 for step in near)
    full = {step for step in range(steps) if schedule.full(Moment(step, steps))}
    assert full == {step for step in schedule.full_steps(steps) if 0 <= step < steps}
    assert 0 in full


def test_quadratic_counts_its_start_and_its_origin_as_full():
    schedule = Quadratic(n=5, center=15, start=3)
    assert {step for step in range(50) if schedule.full(Moment(step, 50))} >= {0, 3}
    assert schedule.full(Moment(8, 50, origin=8))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 11), st.integers(1, 9))
def test_rows_end_where_a_loop_from_step_to_step_ends_them(errors, origin, limit):
    origin, full, total = min(origin, len(errors) - 1), [], 0
    for step in range(origin, len(errors)):
        total += errors[step]
        full.append(step == origin or total > limit)
        total = 0 if full[-1] else total

    def row(last):
        return (total <= limit for total in itertools.accumulate(errors[last + 1 :]))

    assert [ends_row(Moment(step, 12, origin), row) for step in range(origin, len(errors))] == full


def test_a_step_for_which_a_row_has_nothing_is_full():
    moments = [Moment(step, 6) for step in range(6)]
    assert [ends_row(at, lambda last: [True, True]) for at in moments] == [True, False, False, True, False, False]
    assert all(ends_row(at, lambda last: ()) for at in moments)
    assert [ends_row(at, lambda last: itertools.repeat(True)) for at in moments] == [True, *[False] * 5]
