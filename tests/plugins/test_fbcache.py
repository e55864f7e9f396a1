"""First Block Cache is bit-identical to diffusers' hook, and to a naive replay where diffusers has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from support import replays, tiny

import cachekit

STEPS = 8
#: Pipelines, and thresholds at which some steps are skipped and some are not.
CASES: dict[str, tuple[Any, dict[str, Any], tuple[float, ...]]] = {
    "flux": (tiny.flux, {}, (0.1, 0.4)),
    "flux, true guidance": (tiny.flux, replays.TRUE_GUIDANCE, (0.1, 0.4)),
    "wan": (tiny.wan, {}, (0.1, 0.4)),
    "pixart": (tiny.pixart, {}, (0.8, 1.0)),
}


class ByHand(replays.Replay):
    threshold = 0.0

    def is_full(self) -> bool:
        residual, last = self.left - self.entered, self.memory.get("last")
        full = last is None or replays.change(residual, last) > self.threshold
        if full:
            self.memory["last"] = residual
        return full


@pytest.mark.parametrize("case", CASES)
def test_equal_to_diffusers_to_the_bit(case: str) -> None:
    make, changes, thresholds = CASES[case]
    pipe = make()
    calls = STEPS * (2 if case in ("wan", "flux, true guidance") else 1)
    found = []
    for threshold in thresholds:
        config = FirstBlockCacheConfig(threshold=threshold)
        expected = replays.by_diffusers(pipe, apply_first_block_cache, config, STEPS, **changes)
        report = replays.check_applied(pipe, f"fbcache:threshold={threshold}", expected, STEPS, **changes)
        found.append(replays.reused(report))
    assert any(0 < count < calls - calls // STEPS for count in found), found


@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_equal_to_the_replay_where_diffusers_fails(threshold: float) -> None:
    pipe = tiny.sd3()
    hand = ByHand(pipe, 1)
    hand.threshold = threshold
    report = replays.check_applied(pipe, f"fbcache:threshold={threshold}", hand.latents(STEPS), STEPS)
    assert replays.reused(report) == hand.full.count(False)


def test_a_dropped_branch_makes_the_next_step_full() -> None:
    pipe = tiny.pixart()
    with cachekit.apply(pipe, ["fbcache:threshold=100", "adaptive_guidance:m=4"]) as attachment:
        tiny.latents(pipe, steps=STEPS)
        (count,) = [count for count in attachment.report().counts if count.kind == "block"]
    assert (count.stored, count.reused, count.missed) == (2, STEPS - 2, 0)


def test_images_of_a_batch_are_decided_together() -> None:
    pipe = tiny.flux()
    hand = ByHand(pipe, 1)
    hand.threshold = 0.1
    expected = hand.latents(STEPS, batch=2)
    with cachekit.apply(pipe, "fbcache:threshold=0.1"):
        assert torch.equal(tiny.latents(pipe, steps=STEPS, batch=2), expected)
