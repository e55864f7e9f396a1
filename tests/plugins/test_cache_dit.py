"""Forecasts and decisions equal cache-dit's: its Taylor calibrator, and its DBCache with a mask or a threshold."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import block_replays as replays
from support import tiny
from support.comparisons import ROUNDING, compared

import cachekit
from cachekit import Entry, Every, Moment, Taylor, Time
from cachekit.tools.bench.peers import twin

STEPS = 9


@pytest.fixture(scope="module")
def cache_dit() -> Iterator[Any]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it logs at import, and each time a cache is enabled
    yield pytest.importorskip("cache_dit")
    logging.disable(before)


@compared("taylorseer", "the calibrator of cache-dit, on a trace of values", [], ROUNDING)
@pytest.mark.parametrize("interval", [1, 2, 5])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_series_equals_its_calibrator(cache_dit: Any, order: int, interval: int) -> None:
    """It takes no difference in step 1, so that step 0 counts for nothing where step 1 is full too."""
    from cache_dit.caching.cache_contexts.calibrators import TaylorSeerCalibrator

    total, when, what = 20, Every(n=interval, first=3), Taylor(order=order)
    theirs = TaylorSeerCalibrator(order, max_warmup_steps=3, skip_interval_steps=interval)
    theirs.maybe_init_state("trace")
    trace = torch.randn(total, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).cumsum(0)
    history: tuple[Entry, ...] = ()
    for step in range(total):
        theirs.mark_step_begin()
        at = Moment(step, total, time=Time(step))
        assert when.full(at) == theirs.states["trace"].should_compute()
        if when.full(at):
            theirs.update(trace[step], "trace")
            history = (Entry((trace[step],), Time(step)), *history) if step else ()
        else:
            torch.testing.assert_close(what.predict(history, at)[0], theirs.approximate("trace"))
    assert (len(history) == total - 1) == (interval == 1)


def with_dbcache(cache_dit: Any, pipe: Any, order: int = 0, **config: Any) -> torch.Tensor:
    """Latents with the first block computed in all steps, and the others in those that the config chooses."""
    other = twin(pipe)
    # It patches the class of a pipeline, so the copy gets a class of its own.
    cls = type(other)
    other.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__})
    calibrator = None
    if order:  # one of the text would be asked for a residual that the last block does not have
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order, enable_encoder_calibrator=False)
    blocks = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, num_inference_steps=STEPS, **config)
    cache_dit.enable_cache(other, cache_config=blocks, calibrator_config=calibrator)
    try:
        return tiny.latents(other, steps=STEPS)
    finally:
        cache_dit.disable_cache(other)


@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_residuals_of_the_later_blocks_equal_its_dbcache(cache_dit: Any, name: str, order: int) -> None:
    """Within a pipeline its calibrator begins to count a step late, and takes no difference before step 3."""
    pipe, full = getattr(tiny, name)(), [0, 1, 2, 3, 5, 7]
    static = {
        "steps_computation_mask": [int(step in full) for step in range(STEPS)],
        "steps_computation_policy": "static",
    }
    plain, theirs = tiny.latents(pipe, steps=STEPS), with_dbcache(cache_dit, pipe, order, **static)
    what = f"taylor(order={order},of=residual)" if order else "reuse(of=residual)"
    mask = ";".join(map(str, full))
    with cachekit.apply(pipe, f"cache:where=span(first=1),when=mask({mask}),what={what}"):
        ours = tiny.latents(pipe, steps=STEPS)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-3)


@compared("fbcache", "DBCache of cache-dit", "name")
@pytest.mark.parametrize(("name", "threshold"), [("flux", 0.7), ("sd3", 0.7), ("wan", 0.5), ("pixart", 0.8)])
def test_first_block_cache_equals_its_dbcache_to_the_bit(cache_dit: Any, name: str, threshold: float) -> None:
    """Without a warm-up its threshold alone decides, by the change of the first block's residual."""
    pipe = getattr(tiny, name)()
    theirs = with_dbcache(cache_dit, pipe, residual_diff_threshold=threshold, max_warmup_steps=0, warmup_interval=1)
    report = replays.check_applied(pipe, f"fbcache:threshold={threshold}", theirs, STEPS)
    calls = len(report.record.calls)
    assert 0 < replays.reused(report) < calls - calls // STEPS
