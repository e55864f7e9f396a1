"""DiCache equals a naive replay, in its decisions and in what it makes of the last two residuals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import block_replays as replays
from support import tiny
from support.comparisons import compared

import cachekit
from cachekit import Entry, Moment, Signal, Time
from cachekit.testing import Outcome, check_policy

STEPS = 8
PIPES = {"flux": tiny.flux, "sd3": tiny.sd3, "pixart": tiny.pixart, "wan": tiny.wan}


class ByHand(replays.Replay):
    threshold, retained = 0.0, 0.2

    def is_full(self) -> bool:
        memory, probe = self.memory, self.left - self.entered
        full = self.step <= int(self.retained * self.steps) or self.step == self.steps - 1
        if not full:
            memory["sum"] += replays.change(self.left, memory["last"])
            full = memory["sum"] >= self.threshold
        memory["sum"], memory["last"] = 0.0 if full else memory["sum"], self.left
        probes = memory.setdefault("probes", [])
        if full:
            probes.insert(0, probe)
        elif len(probes) > 1:
            # One for each image and branch of the batch.
            moved, between = ([one.abs().mean() for one in (new - probes[1])] for new in (probe, probes[0]))
            memory["gain"] = torch.stack([(a / b).clip(1, 1.5) for a, b in zip(moved, between)])
        return full

    def residual(self, kept: list[Any]) -> list[Any]:
        if len(kept) < 2:
            return kept[0]
        share = self.memory["gain"][:, None, None]
        pairs = zip(kept[0], kept[1])
        return [None if last is None else last * share + before * (1 - share) for last, before in pairs]


CASES = [("flux", 1, 0.6), ("flux", 2, 0.6), ("sd3", 1, 0.6), ("pixart", 1, 1.5), ("wan", 1, 0.6)]


@compared("dicache", "a replay", "name")
@pytest.mark.parametrize(("name", "m", "threshold"), CASES)
def test_equal_to_the_naive_replay(name: str, m: int, threshold: float) -> None:
    pipe = PIPES[name]()
    hand = ByHand(pipe, m)
    hand.threshold = threshold
    report = replays.check_applied(pipe, f"dicache:threshold={threshold},m={m}", hand.latents(STEPS), STEPS)
    assert 0 < replays.reused(report) == hand.full.count(False) < len(hand.full) * (STEPS - 3) / STEPS


def test_with_one_full_step_its_residual_is_reused() -> None:
    pipe = tiny.pixart()
    hand = ByHand(pipe, 1)
    hand.threshold, hand.retained = 1000.0, 0.0
    replays.check_applied(pipe, "dicache:threshold=1000,retained=0", hand.latents(STEPS), STEPS)
    assert hand.full == [True, *[False] * (STEPS - 2), True]


def test_a_dropped_branch_leaves_a_history_that_is_still_read() -> None:
    pipe = tiny.pixart()
    with cachekit.apply(pipe, ["dicache:threshold=1000", "adaptive_guidance:m=5"]) as attachment:
        assert torch.isfinite(tiny.latents(pipe, steps=STEPS)).all()
        (count,) = [count for count in attachment.report().counts if count.kind == "block"]
    # Full are the first two, the first of the branch alone, and the last.
    assert (count.stored + count.computed, count.reused, count.missed) == (4, STEPS - 4, 0)


@pytest.mark.parametrize(("now", "share"), [(0.5, 1.0), (1.25, 1.25), (-1.25, 1.25), (2.0, 1.5)])
def test_the_probe_shows_how_far_the_residual_of_each_image_has_moved(now: float, share: float) -> None:
    """The second image's probe is where it was in the first full step."""
    (choice,) = cachekit.policies()["dicache"]().choices().values()
    entered, memory = torch.ones(2, 2, 3), {}
    for step, residual, full in ((0, 0.0, True), (1, 1.0, True), (2, now, False)):
        at = Moment(step, STEPS, branches=("cond",), memory=memory)
        moved = torch.tensor([residual, float(full and step)])[:, None, None]
        choice.when.took(Signal((entered,), (entered + moved,)), at, full)
    kept = [Entry((torch.full((2, 4, 3), value),), Time(step)) for step, value in ((1, 10.0), (0, 0.0))]
    (made,) = choice.what.predict(tuple(kept), at)
    assert torch.equal(made, torch.tensor([10 * share, 10.0])[:, None, None].expand(2, 4, 3))


def test_a_probe_that_has_not_moved_leaves_the_newest_residual() -> None:
    (choice,) = cachekit.policies()["dicache"]().choices().values()
    entered, memory = torch.ones(1, 2, 3), {}
    for step in range(3):
        at = Moment(step, STEPS, memory=memory)
        choice.when.took(Signal((entered,), (entered + (step == 2),)), at, step < 2)
    kept = tuple(Entry((torch.full((1, 4, 3), value),), Time(0)) for value in (10.0, 0.0))
    assert torch.equal(choice.what.predict(kept, at)[0], kept[0].tensors[0])


@pytest.mark.parametrize("model", ["sd3", "flux", "wan"])
def test_images_of_a_batch_are_those_alone_where_they_are_skipped_together(model: str) -> None:
    checks = ["check_batch_items_independent", "check_branches_do_not_mix", "check_dtype"]
    together = check_policy("dicache:threshold=9", models=[model], checks=checks)
    assert together[0].outcome is together[2].outcome is Outcome.PASSED, together
    assert together[1].outcome is (Outcome.SKIPPED if model == "flux" else Outcome.PASSED), together


def test_the_decision_is_one_for_a_batch() -> None:
    """Of two images one has changed too much; alone, the other would be skipped."""
    (choice,) = cachekit.policies()["dicache"](threshold=0.3).choices().values()
    entered, changed = torch.zeros(2, 2, 3), torch.tensor([1.1, 1.6])[:, None, None]

    def is_full(images: slice) -> bool:
        at = Moment(3, STEPS, memory={})
        choice.when.took(Signal((entered[images],), (entered[images] + 1,)), at, True)
        return choice.when.needs(Signal((entered[images],), (entered[images] + changed[images],)), at)

    assert [is_full(images) for images in (slice(0, 1), slice(1, 2), slice(0, 2))] == [False, True, True]
