"""Workers of a Ray cluster that add their sums have the weights of one process."""

from __future__ import annotations

import pytest
import ray
import torch

from cachekit.errors import CachekitError
from cachekit.models.demo import heldout_captions
from cachekit.tools.calibrating.executors import EXECUTORS, Request

#: One prompt in a call, so that the actors' calls are those of one process to the bit, and sums differ by the order of
#: their addition alone: some terms are nearly parallel, and their weights amplify any other rounding.
REQUEST = Request("demo", "calibrated:interval=2", steps=4, scheduler="euler", batch=1, device="cpu")


@pytest.fixture(autouse=True)
def no_cluster_is_named(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def one_thread():
    """As many threads as an actor has, since their number changes rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_actors_have_the_weights_of_the_whole(one_thread):
    prompts, seen = heldout_captions(3), []
    found = EXECUTORS["ray"](REQUEST, prompts, 3.5, lambda done, total: seen.append((done, total)), 2)
    alone = EXECUTORS["serial"](REQUEST, prompts, 3.5, None, 1)
    assert not ray.is_initialized()
    assert seen == [(1, 2), (2, 2)]
    assert (found.key, found.fits[0].prompts) == (alone.key, 3)
    for one, other in zip(alone.fits[0].steps, found.fits[0].steps):
        assert other.elements == one.elements
        assert other.weights == pytest.approx(one.weights, rel=1e-6, abs=1e-8)
        assert other.error == pytest.approx(one.error, rel=1e-6, abs=1e-9)


def test_an_error_of_a_worker_is_that_of_the_command():
    wrong = Request("demo", "deepcache:interval=2", steps=4, device="cpu")
    with pytest.raises(CachekitError, match="skips more or other than whole calls of the denoiser") as caught:
        EXECUTORS["ray"](wrong, heldout_captions(1), 3.5, None, 1)
    assert "\n" not in str(caught.value)
    assert not ray.is_initialized()
