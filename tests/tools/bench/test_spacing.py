"""Spacings of plain steps: which cells they make, which a scheduler lacks, and the timesteps that they lead to."""

from __future__ import annotations

import diffusers
import pytest
from support import tiny
from support.cells import cell

from cachekit.tools.bench.cells import BenchError
from cachekit.tools.bench.spacing import absent, computed_steps, rivals, scheduler_with, table_of

DENOISER = ["forecast", "denoiser", "denoiser"]


def plan(*marks):
    return {"branches": [], "columns": [["tgate", "attn", "cross_attention", "SrrS"], *([*DENOISER, m] for m in marks)]}


@pytest.mark.parametrize(
    ("stored", "steps"),
    [
        ({}, ()),
        (plan(), ()),
        (plan("SrrS"), (0, 3)),
        (plan("SrSr."), (0, 2, 4)),
        (plan("Srr.", "SrSr"), (0, 2, 3)),
        (plan("S??."), ()),
    ],
)
def test_computed_steps_are_those_that_leave_no_denoiser_out(stored, steps):
    assert computed_steps(stored) == steps


def test_each_number_of_steps_has_every_spacing_once():
    one, other, mixed = cell(("a",)), cell(("b",)), cell(("c", "d"))
    found = rivals([(one, 2, plan("SrrSrr")), (other, 2, plan("SrrSrr")), (mixed, 2, plan("SSrrrr")), (one, 6, None)])
    assert [(found.steps, found.spacing) for found in found] == [
        (2, ""),
        (2, "lu_lambdas"),
        (2, "karras"),
        (2, "full_steps:a"),
        (2, "full_steps:c+d"),
    ]


def test_timesteps_of_another_number_of_steps_are_no_spacing():
    assert [found.spacing for found in rivals([(cell(("a",)), 3, plan("SrrSrr"))])] == ["", "lu_lambdas", "karras"]


@pytest.mark.parametrize(
    ("scheduler", "spacing", "pipeline", "reason"),
    [
        ("DDIMScheduler", "", "StableDiffusionPipeline", ""),
        ("DPMSolverMultistepScheduler", "lu_lambdas", "StableDiffusionPipeline", ""),
        ("EulerDiscreteScheduler", "lu_lambdas", "", "EulerDiscreteScheduler takes no use_lu_lambdas"),
        ("DDIMScheduler", "karras", "", "DDIMScheduler takes no use_karras_sigmas"),
        ("DDIMScheduler", "full_steps:a", "", "DDIMScheduler takes no custom timesteps"),
        ("EulerDiscreteScheduler", "full_steps:a", "StableDiffusionPipeline", ""),
        (
            "DPMSolverMultistepScheduler",
            "full_steps:a",
            "WanPipeline",
            "WanPipeline takes no custom timesteps",
        ),
    ],
)
def test_the_reason_why_a_spacing_is_absent(scheduler, spacing, pipeline, reason):
    # A class of one's own is none of diffusers.
    kind = type(pipeline, (getattr(diffusers, pipeline),), {}) if pipeline else None
    assert absent(cell((), scheduler=scheduler).plain(3, spacing), kind) == reason


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_chosen_timesteps_are_exactly_those_of_the_whole_run(name):
    pipe = tiny.sd()
    scheduler = scheduler_with(pipe, name, "")
    table = table_of(pipe, scheduler, 9, [0, 3, 6, 8])
    whole, chosen = (scheduler_with(pipe, name, "") for _ in range(2))
    whole.set_timesteps(9)
    chosen.set_timesteps(**table)
    assert chosen.timesteps.tolist() == whole.timesteps[[0, 3, 6, 8]].tolist()
    assert chosen.sigmas[:-1].tolist() == pytest.approx(whole.sigmas[[0, 3, 6, 8]].tolist())


def test_a_scheduler_that_runs_other_timesteps_than_asked_is_refused():
    pipe = tiny.sd3()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(BenchError, match="cannot run 3 chosen timesteps of 9: compare with another spacing"):
        table_of(pipe, pipe.scheduler, 9, [0, 4, 8])
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    assert list(table_of(pipe, pipe.scheduler, 9, [0, 4, 8])) == ["sigmas"]


def test_schedulers_with_several_calls_a_step_are_refused():
    pipe = tiny.sd()
    scheduler = scheduler_with(pipe, "HeunDiscreteScheduler", "")
    with pytest.raises(BenchError, match="HeunDiscreteScheduler with StableDiffusionPipeline cannot run"):
        table_of(pipe, scheduler, 9, [0, 4, 8])


@pytest.mark.parametrize(("spacing", "setting"), [("lu_lambdas", "use_lu_lambdas"), ("karras", "use_karras_sigmas")])
def test_a_setting_moves_the_steps_and_nothing_else(spacing, setting):
    pipe = tiny.sd()
    own, spaced = (scheduler_with(pipe, "DPMSolverMultistepScheduler", name) for name in ("", spacing))
    for scheduler in (own, spaced):
        scheduler.set_timesteps(6)
    assert own.timesteps.tolist() != spaced.timesteps.tolist()
    changed = {key for key in own.config if own.config[key] != spaced.config[key] and not key.startswith("_")}
    assert changed == {setting}
