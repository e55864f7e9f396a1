"""Figures that parts of policies measure: files, merging, and runs that they don't serve."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from support import block_replays as replays
from support import commands, tiny

import cachekit
from cachekit import (
    Calibration,
    CalibrationError,
    Choice,
    Every,
    History,
    Measured,
    Moment,
    Policy,
    Reuse,
    Schedule,
    Signal,
    Sites,
    Streams,
)  # fmt: skip

STEPS = 5


class Norms(Measured, Schedule):
    """Computes feed-forward layers where the norm of their output changes."""

    name: ClassVar[str] = "norms"

    def measure(self, kept: Streams, history: History, at: Moment, signal: Signal | None) -> dict[str, float]:
        changes = {"change": float(kept[0].norm() / history[0].tensors[0].norm())} if history else {}
        return {"norm": float(kept[0].norm()), **changes}

    def full(self, at: Moment) -> bool:
        norm = self.figure("norm", at)
        return norm is None or at.step % 2 == 0


class ByNorm(Policy):
    """A schedule with figures, and a choice without any."""

    name: ClassVar[str] = "by_norm"
    summary: ClassVar[str] = "by norm"
    file: str | None = None

    def choices(self) -> dict[str, Choice]:
        return {
            "feed_forward": Choice(Sites(kinds="feed_forward"), Norms(file=self.file), Reuse()),
            "attention": Choice(Sites(kinds="self_attention"), Every(n=2), Reuse()),
        }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = tiny.pixart()
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    path = tmp_path_factory.mktemp("norms") / "norms.json"
    plain = tiny.latents(pipe, steps=STEPS)
    calibration = replays.measured(pipe, ByNorm(), STEPS)
    calibration.save(path)
    assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)
    return pipe, calibration, path


def test_a_file_has_the_means_over_layers_and_steps(made: Any) -> None:
    pipe, calibration, path = made
    assert Calibration.load(path) == calibration
    assert calibration.key.schedule == "norms"
    (fit,) = calibration.fits
    assert (fit.guidance, fit.prompts) == (5.0, 1)
    layers = len(cachekit.sites(pipe)["transformer"].of(cachekit.Kind.FEED_FORWARD))
    assert [{name: mean.count for name, mean in step.items()} for step in fit.steps] == [
        {"norm": layers},
        *[{"norm": layers, "change": layers}] * (STEPS - 1),
    ]
    norms: list[float] = []
    hooks = [
        block.ff.register_forward_hook(lambda _module, _inputs, output: norms.append(float(output.norm())))
        for block in pipe.transformer.transformer_blocks
    ]
    tiny.latents(pipe, steps=STEPS)
    for hook in hooks:
        hook.remove()
    wanted = np.reshape(norms, (STEPS, layers))
    figures = calibration.figures
    np.testing.assert_allclose([step["norm"] for step in figures], wanted.mean(1), rtol=1e-5)
    changes = (wanted[1:] / wanted[:-1]).mean(1)
    np.testing.assert_allclose([step["change"] for step in figures[1:]], changes, rtol=1e-5)


def test_a_figure_that_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Norms, "measure", lambda *_: {"norm": float("nan")})
    with pytest.raises(
        CalibrationError, match=r"^norms: this run can't be calibrated: a figure is not finite; [^\n]+$"
    ):
        replays.measured(tiny.pixart(), ByNorm(), STEPS)


def test_merging_adds_the_figures_of_other_prompts(made: Any) -> None:
    pipe, calibration, _ = made
    other = replays.measured(pipe, ByNorm(), STEPS, prompt_embeds=tiny.text(1, seed=8))
    both = Calibration.merge(calibration, other)
    assert (both.fits[0].prompts, both.fits[0].runs) == (2, 2)
    for merged, one, two in zip(both.figures, calibration.figures, other.figures):
        assert merged == pytest.approx({name: (one[name] + two[name]) / 2 for name in one})
        assert one != two


def test_a_merged_file_weighs_as_many_runs_as_it_was_merged_from(made: Any) -> None:
    """Merged in any order, figures are the mean over all images."""
    pipe, calibration, _ = made
    other = replays.measured(pipe, ByNorm(), STEPS, prompt_embeds=tiny.text(1, seed=8))
    twice = Calibration.merge(Calibration.merge(calibration, calibration), other)
    assert (twice.fits[0].prompts, twice.fits[0].runs) == (3, 3)
    assert twice == Calibration.merge(other, Calibration.merge(calibration, calibration))
    for merged, one, two in zip(twice.figures, calibration.figures, other.figures):
        assert merged == pytest.approx({name: (2 * one[name] + two[name]) / 3 for name in one})


def test_figures_are_no_weights(made: Any) -> None:
    pipe, calibration, path = made
    said = f"{str(path)!r} was made for {calibration.key.schedule}, not calibrated; give another file"
    with tiny.leaves_no_trace(pipe), pytest.raises(CalibrationError) as caught:
        cachekit.apply(pipe, f"calibrated:file={path}")
    assert str(caught.value) == said


def test_another_guidance_scale_stands_beside_the_first(made: Any, tmp_path: Any) -> None:
    pipe, calibration, _ = made
    both = Calibration.merge(calibration, replays.measured(pipe, ByNorm(), STEPS, guidance_scale=3.0))
    path = tmp_path / "both.json"
    both.save(path)
    assert both.scales == [3.0, 5.0]
    with cachekit.apply(pipe, ByNorm(file=str(path))):
        tiny.latents(pipe, steps=STEPS, guidance=4.0)
        with pytest.raises(CalibrationError, match=r"the run has guidance scale 6, not 3 to 5; calibrate at it with"):
            tiny.latents(pipe, steps=STEPS, guidance=6.0)


def test_a_run_with_the_file_reuses(made: Any) -> None:
    pipe, _, path = made
    with cachekit.apply(pipe, ByNorm(file=str(path))) as attachment:
        tiny.latents(pipe, steps=STEPS)
        (count,) = [count for count in attachment.report().counts if count.kind == "feed_forward"]
        assert attachment.plan(50).is_static, "a longer plan has no figures to go by"
    assert count.reused == 2 * count.targets


def refused(pipe: Any, spec: Any, steps: int = STEPS, **changes: Any) -> str:
    with cachekit.apply(pipe, spec), pytest.raises(CalibrationError) as caught:
        tiny.latents(pipe, steps=steps, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_runs_that_the_file_was_not_made_for_are_refused(made: Any) -> None:
    pipe, _, path = made
    policy = ByNorm(file=str(path))
    assert "the run has steps 6, not 5; calibrate for it with cachekit calibrate" in refused(pipe, policy, steps=6)
    assert "the run has guidance scale 7, not 5" in refused(pipe, policy, guidance=7.0)
    other = tiny.pixart(layers=2)
    other.scheduler = pipe.scheduler
    assert "the run has model " in refused(other, policy)
    other = tiny.pixart()
    other.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert "scheduler DPMSolverMultistepScheduler, not EulerDiscreteScheduler" in refused(other, policy)


def test_a_file_made_for_another_part_is_refused_at_once(made: Any) -> None:
    pipe, _, path = made
    for spec, name in (("smoothcache", "error_curves"), ("magcache", "magnitudes")):
        with tiny.leaves_no_trace(pipe), pytest.raises(CalibrationError) as caught:
            cachekit.apply(pipe, f"{spec}:file={path}")
        assert str(caught.value) == f"'{path}' was made for norms, not {name}; make it with cachekit calibrate"


def test_a_file_of_weights_is_refused(made: Any, tmp_path: Any) -> None:
    pipe, _, _ = made
    path = tmp_path / "weights.json"
    replays.measured(pipe, "calibrated:interval=2", STEPS).save(path)
    with pytest.raises(CalibrationError, match=r"was made for every\(last=true\), not magnitudes; make it with"):
        cachekit.apply(pipe, f"magcache:file={path}")


def test_a_file_that_is_missing_is_refused_at_once(made: Any) -> None:
    pipe, _, _ = made
    with (
        tiny.leaves_no_trace(pipe),
        pytest.raises(CalibrationError, match=r"^cannot read 'nowhere.json'"),
    ):
        cachekit.apply(pipe, "magcache:file=nowhere.json")


def test_two_parts_are_measured_one_at_a_time(made: Any) -> None:
    pipe, _, _ = made

    class Both(ByNorm):
        name: ClassVar[str] = "both"

        def choices(self) -> dict[str, Choice]:
            (other,) = cachekit.policies()["magcache"]().choices().values()
            return {**super().choices(), "blocks": other}

    with pytest.raises(CalibrationError, match=r"^both: magnitudes and norms can't be measured together; do one at a"):
        replays.measured(pipe, Both(), STEPS)


# -- the command -----------------------------------------------------------------------------------------------------

ARGUMENTS = ("demo", "--prompts", "1", "--steps", "4", "--scheduler", "euler", "--guidance", "5")


def test_the_command_measures_merges_and_verifies(tmp_path: Any) -> None:
    made, other, both = (tmp_path / f"{name}.json" for name in ("made", "other", "both"))
    given = ("--spec", "block_cache:threshold=0.7", "--output", made)
    printed = commands.printed("calibrate", *ARGUMENTS, *given, "--verify")
    assert "Figures of block_changes." in printed
    assert "down_blocks.0" in printed
    assert "calibrated" in printed
    Calibration.load(made).model_copy(update={"versions": {}}).save(other)
    assert "merged from 2 runs" in commands.printed("calibrate", "--merge", made, "--merge", other, "--output", both)
    one, two = (Calibration.load(path) for path in (made, both))
    assert [(fit.prompts, fit.runs) for (fit,) in (one.fits, two.fits)] == [(1, 1), (2, 2)]
    assert one.figures == two.figures
