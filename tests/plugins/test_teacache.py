"""TeaCache is bit-identical to a naive replay, with given and with measured coefficients."""

from __future__ import annotations

import itertools
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from support import block_replays as replays
from support import tiny
from support.comparisons import compared

import cachekit
from cachekit import SpecError

STEPS = 8
PIPES = {"flux": tiny.flux, "sd3": tiny.sd3, "pixart": tiny.pixart, "wan": tiny.wan}
POLYNOMIAL = (2.0, -1.0, 0.5, 0.8, 0.01)


class ByHand(replays.Replay):
    threshold, coefficients = 0.0, (0.0, 0.0, 0.0, 1.0, 0.0)

    def is_full(self) -> bool:
        memory, full = self.memory, self.step in (0, self.steps - 1)
        if not full:
            memory["sum"] += np.poly1d(self.coefficients)(replays.change(self.entered, memory["last"]))
            full = memory["sum"] >= self.threshold
        memory["sum"], memory["last"] = 0.0 if full else memory["sum"], self.entered
        return full


@compared("teacache", "a replay", PIPES)
@pytest.mark.parametrize(
    ("name", "threshold", "coefficients"),
    [*((name, 1.5 if name == "pixart" else 1.0, ByHand.coefficients) for name in PIPES), ("flux", 1.0, POLYNOMIAL)],
)
def test_equal_to_the_naive_replay(name: str, threshold: float, coefficients: tuple[float, ...]) -> None:
    pipe = PIPES[name]()
    hand = ByHand(pipe)
    hand.threshold, hand.coefficients = threshold, coefficients
    policy = cachekit.policies()["teacache"](threshold=threshold, coefficients=coefficients)
    report = replays.check_applied(pipe, policy, hand.latents(STEPS), STEPS)
    assert 0 < replays.reused(report) == hand.full.count(False) < len(hand.full) * (STEPS - 2) / STEPS


def test_texts_of_the_branches_may_differ_in_length() -> None:
    """What stands in for the skipped attention of the first block has the length of its branch's text."""
    pipe = tiny.qwen()
    short = tiny.text(1, seed=4)[:, :5]
    given = {"negative_prompt_embeds": short, "true_cfg_scale": 4.0, "guidance_scale": None, "height": 32, "width": 32}
    hand = ByHand(pipe, branches=2)
    hand.threshold = 1.0
    report = replays.check_applied(pipe, "teacache:threshold=1", hand.latents(STEPS, **given), STEPS, **given)
    assert 0 < replays.reused(report) == hand.full.count(False)


def test_the_polynomial_is_fitted_to_measured_changes(tmp_path: Any) -> None:
    pipe, path = tiny.flux(), tmp_path / "teacache.json"
    made = replays.measured(pipe, "teacache", STEPS)
    made.save(path)

    class Watching(ByHand):
        def is_full(self) -> bool:
            self.memory.setdefault("inputs", []).append(self.entered)
            return True

    hand, outputs = Watching(pipe), []
    replays.blocks_of(hand.pipe.transformer)[-1].register_forward_hook(
        lambda _module, _inputs, output: outputs.append(replays.image_of(output))
    )
    hand.latents(STEPS)
    changes = [
        [replays.change(new, old) for old, new in itertools.pairwise(seen)] for seen in (hand.memory["inputs"], outputs)
    ]
    measured = [[step[name] for step in made.figures[1:]] for name in ("input", "output")]
    np.testing.assert_allclose(measured, changes, rtol=1e-5)
    hand = ByHand(pipe)
    hand.threshold, hand.coefficients = 0.5, tuple(np.polyfit(*measured, 4))
    expected = hand.latents(STEPS)
    report = replays.check_applied(pipe, f"teacache:threshold=0.5,file={path}", expected, STEPS)
    assert replays.reused(report) == hand.full.count(False) > 0


def test_changes_are_means_over_images(tmp_path: Any) -> None:
    """One batch of two prompts gives the figures of two batches of one."""
    pipe = tiny.sd3()
    given = tiny.arguments(pipe, batch=2)
    names = [name for name in given if name.endswith("embeds")]
    prompts = [{name: given[name][place : place + 1] for name in names} for place in range(2)]
    call = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 16, "width": 16}
    together, apart = (cachekit.calibrate(pipe, "teacache", prompts, batch=batch, **call) for batch in (2, 1))
    for one, other in zip(together.figures, apart.figures):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-4)
    assert fmean(step["input"] for step in together.figures[1:]) > 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("teacache:coefficients=1;2", "coefficients"),
        ("teacache:file=a.json,coefficients=1;2;3;4;5", "coefficients and file exclude each other"),
    ],
)
def test_options_that_make_no_sense(spec: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        cachekit.apply(tiny.pixart(), spec)


def test_nothing_is_lost_where_another_policy_drops_a_branch() -> None:
    pipe = tiny.pixart()
    with cachekit.apply(pipe, ["teacache:threshold=100", "adaptive_guidance:m=4"]) as attachment:
        assert torch.isfinite(tiny.latents(pipe, steps=STEPS)).all()
        (count,) = [count for count in attachment.report().counts if count.kind == "block"]
    # Full are the first step, the one after the branch has been dropped, and the last, which keeps nothing.
    assert (count.stored, count.computed, count.reused) == (2, 1, STEPS - 3)
