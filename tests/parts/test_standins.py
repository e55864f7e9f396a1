"""Stand-ins against the series that they are named after, computed by other means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.polynomial import chebyshev, hermite

from cachekit import (
    Chebyshev,
    Drop,
    Entry,
    Hermite,
    Linear,
    Moment,
    PolicyError,
    Reuse,
    StandIn,
    Taylor,
    Time,
    combine,
)


def time_at(step, **given):
    return Time(step, timestep=1000.0 - step, **given)


def history_of(function, steps, dtype=torch.float64):
    """Keep a function's values of these steps, the newest first, in two streams."""
    entries = []
    for step in sorted(steps, reverse=True):
        value = torch.as_tensor(function(float(step)), dtype=torch.float64)
        entries.append(Entry((value.to(dtype), (2 * value).to(dtype)), time_at(step)))
    return tuple(entries)


def moment(step, steps=50, **given):
    return Moment(step, steps, time=time_at(step, **given))


A, B, C = torch.randn(3, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def line(x):
    return A + B * x


def parabola(x):
    return A + B * x + C * x * x


SEVERAL = st.sets(st.integers(0, 30), min_size=3, max_size=5)


@given(SEVERAL, st.integers(31, 40))
@settings(deadline=None)
def test_a_line_is_reproduced_exactly(steps, ahead):
    first, second = Linear().predict(history_of(line, steps), moment(ahead))
    torch.testing.assert_close(first, line(ahead))
    torch.testing.assert_close(second, 2 * line(ahead))


def test_a_parabola_with_equal_gaps_is_reproduced_up_to_the_difference_of_its_second_term():
    """The Taylor series has s^2 / 2 times the second difference, as published; Newton's has s (s + h) / 2."""
    history = history_of(parabola, [4, 6, 8])
    found = Taylor(order=2).predict(history, moment(9))[0]
    difference = (parabola(8) - parabola(6)) / 2
    second = (difference - (parabola(6) - parabola(4)) / 2) / 2
    torch.testing.assert_close(found, parabola(8) + difference + second / 2)


def test_order_0_is_the_newest_value_itself():
    history = history_of(parabola, [4, 6, 8])
    assert Taylor(order=0).predict(history, moment(9)) is history[0].tensors
    assert Reuse().predict(history, moment(9)) is history[0].tensors


def test_of_one_value_every_series_is_that_value():
    history = history_of(line, [4])
    for what in (Linear(), Taylor(order=3), Hermite(order=2)):
        assert what.predict(history, moment(7)) is history[0].tensors


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0])
def test_hermite_has_the_polynomials_of_numpy(order, sigma):
    steps, ahead = [0, 3, 5, 9, 11][-order - 1 :], 14
    history = history_of(parabola, steps)
    differences = [[parabola(step) for step in reversed(steps)]]
    places = list(reversed(steps))
    for _ in range(order):
        gaps = [places[k] - places[k + 1] for k in range(len(differences[-1]) - 1)]
        differences.append([(a - b) / gap for a, b, gap in zip(differences[-1], differences[-1][1:], gaps)])
    expected = torch.zeros_like(A)
    for degree in range(order + 1):
        value = hermite.hermval(sigma * (ahead - places[0]), [0] * degree + [1])
        expected = expected + sigma**degree * value / math.factorial(degree) * differences[degree][0]
    torch.testing.assert_close(Hermite(order=order, sigma=sigma).predict(history, moment(ahead))[0], expected)


def test_the_polynomials_have_the_sign_of_the_physicists():
    """H_1(x) = 2x grows with the distance ahead, and H_2(x) = 4x^2 - 2 is negative near 0."""
    what = Hermite(order=2, sigma=0.5)
    assert what.factor(1, 2.0) == pytest.approx(0.5 * 2 * 1.0)
    assert what.factor(1, 2.0) > 0
    assert what.factor(2, 0.0) == pytest.approx(0.25 * -2 / 2)
    assert what.factor(2, 4.0) == pytest.approx(0.25 * (4 * 4 - 2) / 2)


@pytest.mark.parametrize(("degree", "ridge"), [(1, 0.1), (4, 0.1), (6, 2.5), (2, 1e-9)])
@pytest.mark.parametrize("steps", [[0, 2, 4, 9], list(range(12)), [3]])
def test_chebyshev_is_ridge_regression(degree, ridge, steps):
    ahead, total = 15, 25
    found = Chebyshev(degree=degree, ridge=ridge).predict(history_of(parabola, steps), moment(ahead, total))[0]
    design = chebyshev.chebvander(2 * np.array(steps) / (total - 1) - 1, degree)
    values = np.stack([parabola(step).numpy().ravel() for step in steps])
    # Ridge regression as least squares with rows for the penalty.
    padded = np.vstack([design, math.sqrt(ridge) * np.eye(degree + 1)])
    coefficients = np.linalg.lstsq(padded, np.vstack([values, np.zeros((degree + 1, values.shape[1]))]), rcond=None)[0]
    expected = chebyshev.chebvander(np.array([2 * ahead / (total - 1) - 1]), degree) @ coefficients
    np.testing.assert_allclose(found.numpy().ravel(), expected[0], rtol=1e-5, atol=1e-7)


def test_chebyshev_reads_all_of_the_run():
    assert Chebyshev().entries is None
    assert len(Chebyshev().weights([Time(step) for step in range(40)], moment(41))) == 40


# -- the axis --------------------------------------------------------------------------------------------------


def test_a_line_along_sigma():
    entries = tuple(
        Entry((torch.tensor([10 * sigma]),), time_at(step, sigma=sigma)) for step, sigma in ((2, 0.5), (0, 0.9))
    )
    found = Linear(axis="sigma").predict(entries, moment(3, sigma=0.4))[0]
    torch.testing.assert_close(found, torch.tensor([4.0]))


def test_a_line_along_log_snr():
    times = [time_at(step, sigma=sigma, alpha=1 - sigma) for step, sigma in ((2, 0.5), (0, 0.8))]
    entries = tuple(Entry((torch.tensor([time.log_snr], dtype=torch.float64),), time) for time in times)
    here = time_at(3, sigma=0.2, alpha=0.8)
    found = Linear(axis="log_snr").predict(entries, Moment(3, 50, time=here))[0]
    torch.testing.assert_close(found, torch.tensor([math.log(0.8 / 0.2)], dtype=torch.float64))


@pytest.mark.parametrize("sigmas", [(0.5, 0.5, 0.4), (0.5, 0.4, 0.5)])
def test_where_the_axis_stands_still_the_step_takes_its_place(sigmas):
    """Schedulers with several calls a step repeat their sigmas: a gap of 0 would be divided by."""
    newest, older, here = sigmas
    times = [Time(4, sigma=newest), Time(2, sigma=older)]
    at = Moment(5, 25, time=Time(5, sigma=here))
    assert Linear(axis="sigma").weights(times, at) == Linear().weights(times, at) == [1.5, -0.5]


def test_where_log_snr_is_infinite_the_step_takes_its_place():
    """Flow matching begins with pure noise, and reaches a log-SNR of 0 halfway."""
    noise, half, here = (
        time_at(0, sigma=1.0, alpha=0.0),
        time_at(2, sigma=0.5, alpha=0.5),
        time_at(3, sigma=0.2, alpha=0.8),
    )
    line = Linear(axis="log_snr")
    assert (noise.log_snr, half.log_snr, time_at(9, sigma=0.0, alpha=1.0).log_snr) == (-math.inf, 0.0, math.inf)
    assert line.missing([noise, half, here]) == ""
    assert line.weights([half, noise], Moment(3, 50, time=here)) == [1.5, -0.5]
    assert line.weights([noise], Moment(3, 50, time=here)) == [1.0]


def test_an_axis_that_the_scheduler_does_not_give_is_one_line():
    with pytest.raises(PolicyError, match=r"linear\(axis=sigma\): no sigma at step 5; use axis=step"):
        Linear(axis="sigma").weights([Time(4), Time(2)], Moment(5, 25, time=Time(5)))
    assert Linear(axis="sigma").missing([Time(4, sigma=0.5), Time(5)]) == "sigma"
    assert Linear(axis="log_snr", of="x0").missing([Time(0)]) == "kind and sigma and log_snr"
    assert Linear().missing([Time(0)]) == ""


# -- sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_added_up_in_float32(dtype):
    history = history_of(lambda x: A * 100 + x, [2, 4, 6], dtype)
    weights = Taylor(order=2).weights([entry.at for entry in history], moment(7))
    found = combine(history, weights)
    exact = sum(entry.tensors[0].double() * weight for entry, weight in zip(history, weights))
    assert found[0].dtype is dtype
    assert torch.equal(found[0], exact.float().to(dtype))
    coarse = sum(entry.tensors[0] * weight for entry, weight in zip(history, weights))
    assert not torch.equal(found[0], coarse)


def test_entries_without_weight_are_not_read():
    history = history_of(line, [2, 4])
    broken = (history[0], Entry((torch.full_like(A, math.nan),) * 2, time_at(2)))
    assert torch.equal(combine(broken, [0.5, 0.0])[0], history[0].tensors[0] * 0.5)
    assert torch.equal(combine(history, [0.0, 0.0])[0], torch.zeros_like(A))
    assert combine(history, [0.0, 1.0]) is history[1].tensors


def test_drop_is_the_output_of_the_branch_that_runs():
    assert Drop().predict((), moment(3), (A,)) == (A,)
    assert Drop().entries == 0


def test_a_stand_in_of_a_plugin_needs_weights_alone():
    class Average(StandIn):
        length = 2

        def weights(self, times, at):
            return [1 / len(times)] * len(times)

    torch.testing.assert_close(Average().predict(history_of(line, [2, 4]), moment(5))[0], line(3))


@pytest.mark.parametrize(("what", "entries"), [(Reuse(), 1), (Linear(), 2), (Taylor(order=3), 4), (Hermite(), 2)])
def test_how_many_entries_are_kept(what, entries):
    assert what.entries == entries
