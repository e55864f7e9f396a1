"""First Block Cache is bit-identical to diffusers' hook, and to a naive replay where diffusers has none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from support import block_replays as replays
from support import tiny
from support.comparisons import compared

import cachekit

STEPS = 8
#: Pipelines, arguments, and a threshold at which some steps are skipped and some are not.
CASES: dict[str, tuple[Any, dict[str, Any], float]] = {
    "flux": (tiny.flux, {}, 0.7),
    "flux, true guidance": (tiny.flux, replays.TRUE_GUIDANCE, 0.7),
    "wan": (tiny.wan, {}, 0.5),
    "pixart": (tiny.pixart, {}, 1.0),
}


class ByHand(replays.Replay):
    threshold = 0.0

    def is_full(self) -> bool:
        residual, last = self.left - self.entered, self.memory.get("last")
        full = last is None or replays.change(residual, last) > self.threshold
        if full:
            self.memory["last"] = residual
        return full


@compared("fbcache", "diffusers", "case")
@pytest.mark.parametrize("case", CASES)
def test_equal_to_diffusers_to_the_bit(case: str) -> None:
    make, changes, threshold = CASES[case]
    pipe, config = make(), FirstBlockCacheConfig(threshold=threshold)
    expected = replays.by_diffusers(pipe, apply_first_block_cache, config, STEPS, **changes)
    report = replays.check_applied(pipe, f"fbcache:threshold={threshold}", expected, STEPS, **changes)
    calls = len(report.record.calls)
    assert 0 < replays.reused(report) < calls - calls // STEPS


@compared("fbcache", "a replay", ["sd3"])
def test_equal_to_the_replay_where_diffusers_fails() -> None:
    pipe = tiny.sd3()
    with pytest.raises(TypeError, match="NoneType"):  # it subtracts the text that SD3's last block doesn't return
        replays.by_diffusers(pipe, apply_first_block_cache, FirstBlockCacheConfig(threshold=1.0), 1)
    hand = ByHand(pipe, 1)
    hand.threshold = 1.0
    report = replays.check_applied(pipe, "fbcache:threshold=1", hand.latents(STEPS), STEPS)
    assert 0 < replays.reused(report) == hand.full.count(False) < STEPS - 1


def test_a_dropped_branch_makes_the_next_step_full() -> None:
    pipe = tiny.pixart()
    with cachekit.apply(pipe, ["fbcache:threshold=100", "adaptive_guidance:m=4"]) as attachment:
        tiny.latents(pipe, steps=STEPS)
        (count,) = [count for count in attachment.report().counts if count.kind == "block"]
    assert (count.stored, count.reused, count.missed) == (2, STEPS - 2, 0)


def test_images_of_a_batch_are_decided_together() -> None:
    pipe = tiny.flux()
    hand = ByHand(pipe, 1)
    hand.threshold = 0.7
    expected = hand.latents(STEPS, batch=2)
    with cachekit.apply(pipe, "fbcache:threshold=0.7"):
        assert torch.equal(tiny.latents(pipe, steps=STEPS, batch=2), expected)
