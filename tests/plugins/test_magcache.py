"""MagCache is bit-identical to diffusers' hook, and measures the ratios that it measures."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from diffusers.hooks import MagCacheConfig, apply_mag_cache
from support import block_replays as replays
from support import tiny
from support.comparisons import ROUNDING, compared

import cachekit
from cachekit import Action, CalibrationError, SpecError

STEPS = 10
PIPES = {"flux": tiny.flux, "wan": tiny.wan, "pixart": tiny.pixart, "sd3": tiny.sd3}
RATIOS = (1.0, 1.21, 1.12, 0.98, 1.01, 0.97, 0.99, 1.02, 0.93, 0.9)
SHORT = (1.0, 1.1, 0.99, 1.02, 0.96, 0.9)


def config(**changes: Any) -> MagCacheConfig:
    names = {"longest": "max_skip_steps", "retained": "retention_ratio", "ratios": "mag_ratios"}
    given = {names.get(name, name): list(value) if name == "ratios" else value for name, value in changes.items()}
    return MagCacheConfig(num_inference_steps=STEPS, **given)


@compared("magcache", "diffusers", "name")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flux", {"threshold": 0.06, "longest": 3, "retained": 0.2, "ratios": RATIOS}),
        ("flux", {"threshold": 0.24, "longest": 5, "retained": 0.1, "ratios": SHORT}),
        ("wan", {"threshold": 0.3, "longest": 2, "retained": 0.0, "ratios": RATIOS}),
        ("pixart", {"threshold": 0.3, "longest": 2, "retained": 0.0, "ratios": RATIOS}),
        ("sd3", {"threshold": 0.3, "longest": 2, "retained": 0.0, "ratios": RATIOS}),
    ],
    ids=["flux", "flux, other steps", "wan, nothing retained", "pixart, nothing retained", "sd3, nothing retained"],
)
def test_equal_to_diffusers_to_the_bit(name: str, options: dict[str, Any]) -> None:
    pipe = PIPES[name]()
    expected = replays.by_diffusers(pipe, apply_mag_cache, config(**options), STEPS)
    report = replays.check_applied(pipe, cachekit.policies()["magcache"](**options), expected, STEPS)
    assert 0 < replays.reused(report) < len(report.record.calls)


@compared("magcache", "diffusers: the measured ratios", "name", ROUNDING)
@pytest.mark.parametrize("name", PIPES)
def test_the_measured_ratios_are_those_of_diffusers(
    name: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, path = PIPES[name](), tmp_path / "magcache.json"
    made = replays.measured(pipe, "magcache", STEPS)
    made.save(path)
    capsys.readouterr()
    replays.by_diffusers(pipe, apply_mag_cache, config(calibrate=True), STEPS)
    lists = re.findall(r"^\[([\d., e-]+)\]$", capsys.readouterr().out, re.MULTILINE)
    printed = [[float(item) for item in found.split(",")] for found in lists]
    theirs = np.mean(printed, axis=0)  # Wan prints a list for each branch
    ours = [step.get("ratio", 1.0) for step in made.figures]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    options = {"threshold": 0.5, "retained": 0.1}
    policy = cachekit.policies()["magcache"]
    with cachekit.apply(pipe, policy(file=str(path), **options)) as attachment:
        found = tiny.latents(pipe, steps=STEPS)
        assert attachment.plan(STEPS).is_static
    with cachekit.apply(pipe, policy(ratios=tuple(ours), **options)):
        assert found.equal(tiny.latents(pipe, steps=STEPS))


def full_steps(spec: Any, steps: int = STEPS) -> list[int]:
    with cachekit.apply(tiny.pixart(), spec) as attachment:
        rows = attachment.plan(steps).rows
    return [row.step for row in rows if row.actions[0] is not Action.REUSE]


def test_the_error_adds_up_and_starts_anew() -> None:
    # 0.1, then 0.1 + 0.21 = 0.31: with 0.25 one step is skipped, then one is full.
    spec = "magcache:retained=0.2,threshold=0.25,ratios=" + ";".join(["1.1"] * STEPS)
    assert full_steps(spec) == [0, 1, 3, 5, 7, 9]
    spec = "magcache:retained=0,longest=4,ratios=" + ";".join(["1"] * STEPS)
    assert full_steps(spec) == [0, 5]


def test_without_ratios_every_step_is_full_and_a_run_is_refused() -> None:
    assert full_steps("magcache") == list(range(STEPS))
    pipe = tiny.pixart()
    with (
        cachekit.apply(pipe, "magcache"),
        pytest.raises(CalibrationError, match=r"no figures yet; give file=, made by cachekit calibrate$"),
    ):
        tiny.latents(pipe, steps=STEPS)


def test_ratios_and_file_exclude_each_other() -> None:
    with pytest.raises(SpecError, match="ratios and file exclude each other; give one of them"):
        cachekit.apply(tiny.pixart(), "magcache:ratios=1;1,file=a.json")


def test_a_step_that_another_policy_forces_starts_the_error_anew() -> None:
    spec = "magcache:retained=0,longest=4,ratios=" + ";".join(["1"] * STEPS)
    assert full_steps([spec, "tgate:m=4"])[:2] == [0, 3]
