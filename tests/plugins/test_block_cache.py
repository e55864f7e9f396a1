"""Block caching is bit-identical to a naive replay, with changes measured by hand and the mask that follows."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from support import block_replays as replays
from support import tiny
from support.comparisons import compared

import cachekit
from cachekit import SiteError

STEPS = 8


class Blocks:
    """All blocks of a UNet run, and return what they did in an earlier step where their mask says so."""

    def __init__(self, pipe: Any, masks: dict[str, list[bool]]) -> None:
        self.pipe, self.masks = copy.deepcopy(pipe), masks
        self.outputs: dict[str, list[Any]] = defaultdict(list)
        unet = self.pipe.unet
        for name in (*(f"down_blocks.{place}" for place in range(len(unet.down_blocks))), "mid_block"):
            unet.get_submodule(name).register_forward_hook(self.leave(name))
        for place, block in enumerate(unet.up_blocks):
            block.register_forward_hook(self.leave(f"up_blocks.{place}"))

    def leave(self, name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            outputs = self.outputs[name]
            is_full = not self.masks or self.masks[name][len(outputs)]
            outputs.append(output if is_full else outputs[-1])
            return outputs[-1]

        return hook

    def changes(self) -> dict[str, list[float]]:
        """The change of each block in the steps from 1 on."""
        return {name: [change(old, new) for old, new in itertools.pairwise(run)] for name, run in self.outputs.items()}


def change(old: Any, new: Any) -> float:
    pairs = zip(*(output[0] if isinstance(output, tuple) else output for output in (old, new)))
    return fmean(float((one - other).abs().sum() / other.abs().sum()) for one, other in pairs)


def mask(changes: list[float], threshold: float) -> list[bool]:
    full, total = [True], 0.0
    for value in changes:
        total += value
        full.append(total > threshold)
        total = 0.0 if full[-1] else total
    return full


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline, the file of its changes, and these changes by hand."""
    pipe = tiny.small()
    path = tmp_path_factory.mktemp("blocks") / "block_cache.json"
    calibration = replays.measured(pipe, "block_cache", STEPS)
    calibration.save(path)
    plain = Blocks(pipe, {})
    tiny.latents(plain.pipe, steps=STEPS)
    return pipe, path, calibration, plain.changes()


def test_the_measured_changes_are_those_by_hand(made: Any) -> None:
    _, _, calibration, changes = made
    first, *later = calibration.figures
    assert first == {}
    for step, figures in enumerate(later):
        assert figures.keys() == changes.keys()
        np.testing.assert_allclose(
            [figures[name] for name in changes], [run[step] for run in changes.values()], rtol=1e-4
        )


@compared("block_cache", "a replay", ["small"])
def test_equal_to_the_naive_replay(made: Any) -> None:
    pipe, path, _, changes = made
    threshold = round(1.7 * float(np.median(list(changes.values()))), 4)
    masks = {name: mask(run, threshold) for name, run in changes.items()}
    assert len({tuple(one) for one in masks.values()}) > 1, "blocks have full steps of their own"
    expected = tiny.latents(Blocks(pipe, masks).pipe, steps=STEPS)
    report = replays.check_applied(pipe, f"block_cache:threshold={threshold},file={path}", expected, STEPS)
    assert replays.reused(report) == sum(one.count(False) for one in masks.values()) > 0


def test_what_is_edited_in_place_later_is_not_what_is_kept(made: Any) -> None:
    """FreeU writes into what enters the up blocks."""
    pipe, path, _, _ = made
    freed = copy.deepcopy(pipe)
    freed.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    whole = replays.measured(freed, "block_cache", STEPS)
    whole.save(path.with_name("freed.json"))
    with cachekit.apply(freed, f"block_cache:threshold=1000,file={path.with_name('freed.json')}") as attachment:
        cached = tiny.latents(freed, steps=STEPS)
        assert replays.reused(attachment.report()) > 0
    with cachekit.apply(freed, f"block_cache:threshold=1000,file={path.with_name('freed.json')}"):
        assert torch.equal(tiny.latents(freed, steps=STEPS), cached)


def test_a_transformer_is_refused_with_what_to_use() -> None:
    with pytest.raises(
        SiteError, match=r"looked for the blocks of a UNet, but PixArt.*; use smoothcache or delta_dit$"
    ):
        cachekit.apply(tiny.pixart(), "block_cache")
