"""EasyCache equals a loop written by hand to the bit: on UNets, transformers, and with a call for each branch."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from support import block_replays as replays
from support import tiny
from support.comparisons import compared

import cachekit

STEPS = 8
#: Pipelines, and a threshold at which some calls are left out and some are not.
PIPES = {"sd": (tiny.small, 0.3), "pixart": (tiny.pixart, 1.5), "flux": (tiny.flux, 0.6), "wan": (tiny.wan, 1.5)}


class ByHand:
    """The rule in place of a denoiser's forward; the first call of a step decides for those of other branches."""

    def __init__(self, pipe: Any, threshold: float, first: int) -> None:
        denoiser = tiny.denoiser_of(pipe)
        self.forward, self.threshold, self.first = denoiser.forward, threshold, first
        self.calls, self.count, self.full = 2 if type(pipe).__name__ == "WanPipeline" else 1, 0, []
        self.states: dict[int, dict[str, Any]] = defaultdict(dict)
        denoiser.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        sample = next(kwargs[name] for name in ("sample", "hidden_states") if name in kwargs) if not args else args[0]
        step, branch = divmod(self.count, self.calls)
        self.count += 1
        state = self.states[branch]
        if branch == 0:
            self.full.append(self.decide(step, sample, state))
        state["last"] = sample
        if self.full[-1]:
            output = self.forward(*args, **kwargs)
            self.learn(sample, output[0], state)
            return output
        made = state["output"].clone()
        shared = tuple(slice(min(sizes)) for sizes in zip(made.shape, sample.shape))
        made[shared] = (made[shared] - state["sample"]) + sample
        return (made,)

    def decide(self, step: int, sample: torch.Tensor, state: dict[str, Any]) -> bool:
        full = step < self.first or step == STEPS - 1
        if not full:
            state["error"] += state["k"] * mean(sample - state["last"]) / mean(state["output"])
            full = bool(state["error"] >= self.threshold)
        state["error"] = 0.0 if full else state["error"]
        return full

    def learn(self, sample: torch.Tensor, output: torch.Tensor, state: dict[str, Any]) -> None:
        if "sample" in state:
            state["k"] = mean(output - state["output"]) / mean(sample - state["sample"])
        state["sample"], state["output"] = sample, output


def mean(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().mean()


@compared("easycache", "a replay", "name")
@pytest.mark.parametrize("name", PIPES)
def test_equal_to_the_loop_by_hand(name: str) -> None:
    make, threshold = PIPES[name]
    pipe, twin = make(), make()
    hand = ByHand(twin, threshold, first=2)
    expected = tiny.latents(twin, steps=STEPS)
    report = replays.check_applied(pipe, f"easycache:threshold={threshold},first=2", expected, STEPS)
    assert report.left_out == hand.full.count(False) * hand.calls
    assert 0 < hand.full.count(False) < STEPS - 3


def test_the_last_step_may_be_left_out() -> None:
    pipe = tiny.pixart()
    for last, left_out in (("true", STEPS - 3), ("false", STEPS - 2)):
        with cachekit.apply(pipe, f"easycache:threshold=1000,first=2,last={last}") as attachment:
            tiny.latents(pipe, steps=STEPS)
            assert attachment.report().left_out == left_out


def test_one_full_step_shows_no_rate_so_the_next_is_full_too() -> None:
    pipe = tiny.pixart()
    with cachekit.apply(pipe, "easycache:threshold=1000,first=1") as attachment:
        tiny.latents(pipe, steps=STEPS)
        assert attachment.report().left_out == STEPS - 3


def test_a_branch_that_is_dropped_has_a_memory_of_its_own() -> None:
    pipe = tiny.pixart()
    with cachekit.apply(pipe, ["easycache:threshold=1000,first=2", "adaptive_guidance:m=5"]) as attachment:
        assert torch.isfinite(tiny.latents(pipe, steps=STEPS)).all()
        report = attachment.report()
    # Full are steps 0 and 1 of both branches, steps 5 and 6 of the one that remains, and the last one.
    assert report.left_out == STEPS - 5
