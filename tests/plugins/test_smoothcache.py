"""SmoothCache is bit-identical to a naive replay, with error curves measured by hand and the mask that follows."""

from __future__ import annotations

import copy
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
from cachekit import Action, CalibrationError, Kind

STEPS = 8
KINDS = (Kind.SELF_ATTENTION, Kind.CROSS_ATTENTION, Kind.JOINT_ATTENTION, Kind.FEED_FORWARD)
PIPES = {"dit": tiny.dit, "pixart": tiny.pixart, "flux": tiny.flux, "wan": tiny.wan}


def first_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


class Layers:
    """All layers run, and return what they did in an earlier step where the mask of their kind says so."""

    def __init__(self, pipe: Any, masks: dict[str, list[bool]]) -> None:
        self.pipe, self.masks, self.call = copy.deepcopy(pipe), masks, -1
        self.calls = 2 if type(pipe).__name__ == "WanPipeline" else 1
        self.outputs: dict[tuple[str, str, int], list[Any]] = defaultdict(list)
        model = self.pipe.transformer
        model.register_forward_pre_hook(self.begin)
        for site in cachekit.sites(self.pipe)["transformer"].of(*KINDS):
            model.get_submodule(site.name).register_forward_hook(self.leave(str(site.kind), site.name))

    def begin(self, _module: Any, _inputs: Any) -> None:
        self.call += 1

    def leave(self, kind: str, name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            step, branch = divmod(self.call, self.calls)
            outputs = self.outputs[kind, name, branch]
            is_full = not self.masks or self.masks[kind][step]
            outputs.append(output if is_full else outputs[-1])
            return outputs[-1]

        return hook

    def curves(self, longest: int = 5) -> dict[str, list[dict[int, float]]]:
        """The errors by kind, step and gap, of a run without masks."""
        found: dict[str, list[dict[int, float]]] = {}
        for kind in {kind for kind, _, _ in self.outputs}:
            runs = [outputs for (of, _, _), outputs in self.outputs.items() if of == kind]
            found[kind] = [
                {
                    gap: fmean(error(run[step - gap], run[step]) for run in runs)
                    for gap in range(1, min(step, longest) + 1)
                }
                for step in range(STEPS)
            ]
        return found


def error(old: Any, new: Any) -> float:
    """The mean error over the images and branches of a batch."""
    pairs = zip(first_of(old), first_of(new))
    return fmean(float((one - other).abs().sum() / other.abs().sum()) for one, other in pairs)


def mask(curve: list[dict[int, float]], threshold: float, longest: int) -> list[bool]:
    full, last = [], 0
    for step in range(STEPS):
        gap = step - last
        full.append(step == 0 or gap > longest or curve[step][gap] >= threshold)
        last = step if full[-1] else last
    return full


@pytest.fixture(scope="module", params=PIPES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline, the file of its error curves, and these curves by hand."""
    pipe = PIPES[request.param]()
    path = tmp_path_factory.mktemp(request.param) / "smoothcache.json"
    calibration = replays.measured(pipe, "smoothcache", STEPS)
    calibration.save(path)
    plain = Layers(pipe, {})
    tiny.latents(plain.pipe, steps=STEPS)
    return pipe, path, calibration, plain.curves()


def test_the_measured_errors_are_those_by_hand(made: Any) -> None:
    _, _, calibration, curves = made
    expected = [
        {f"{kind}.{gap}": value for kind, curve in curves.items() for gap, value in curve[step].items()}
        for step in range(STEPS)
    ]
    for figures, wanted in zip(calibration.figures, expected, strict=True):
        assert figures.keys() == wanted.keys()
        np.testing.assert_allclose([figures[name] for name in wanted], list(wanted.values()), rtol=1e-4)


@compared("smoothcache", "a replay", PIPES)
def test_equal_to_the_naive_replay(made: Any) -> None:
    pipe, path, _, curves = made
    longest = 2
    # Between the errors there are, so that some steps of each kind are reused and some are not.
    threshold = round(
        float(np.median([value for curve in curves.values() for step in curve[1:] for value in step.values()])), 4
    )
    masks = {kind: mask(curve, threshold, longest) for kind, curve in curves.items()}
    hand = Layers(pipe, masks)
    expected = tiny.latents(hand.pipe, steps=STEPS)
    spec = f"smoothcache:threshold={threshold},longest={longest},file={path}"
    report = replays.check_applied(pipe, spec, expected, STEPS)
    for count in report.counts:
        assert count.reused == count.targets * masks[str(count.kind)].count(False) * hand.calls
    assert replays.reused(report) > 0


def test_the_plan_has_the_mask_of_each_kind(made: Any) -> None:
    pipe, path, _, curves = made
    with cachekit.apply(pipe, f"smoothcache:threshold=0.5,file={path}") as attachment:
        plan = attachment.plan(STEPS)
    assert plan.is_static
    for index, bound in enumerate(plan.assignments):
        full = [row.actions[index] is not Action.REUSE for row in plan.rows]
        assert full == mask(curves[str(bound.target.kind)], 0.5, 3)


def test_a_run_without_a_file_is_refused() -> None:
    pipe = tiny.pixart()
    with cachekit.apply(pipe, "smoothcache"), pytest.raises(CalibrationError, match="error_curves has no figures yet"):
        tiny.latents(pipe, steps=STEPS)
