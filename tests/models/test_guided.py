"""Whether runs of a model have guidance branches unless told otherwise: the same to all that ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler, LCMScheduler
from support import tiny
from support.commands import printed, save_without_weights

import cachekit
from cachekit.models.architectures import architecture, guided_by_default
from cachekit.models.loading import pipeline_from_config
from cachekit.registry.catalog import installed
from cachekit.tools.app.preview import Outline
from cachekit.tools.tuning.subject import Subject


def branches(plan: Any) -> set[int]:
    return {len(row.branches) for row in plan.rows}


@pytest.mark.parametrize(
    ("model", "guided"), [("demo", True), ("demo-lcm", False), ("pixart-alpha", True), ("lcm-pixart", False)]
)
def test_a_model_by_its_name(model: str, guided: bool) -> None:
    expected, specs = {1 + guided}, "forecast:interval=2"
    data = json.loads(printed("plan", specs, "--steps", 4, "--model", model, "--json", "-"))
    assert {len(row) for row in data["branches"]} == expected
    assert branches(cachekit.estimate(model, specs, num_inference_steps=4).plan) == expected
    assert Outline(model, installed()).defaults.guided is Subject.of(model).guided is guided


@pytest.mark.parametrize("name", ["pixart-alpha", "lcm-pixart", "flux"])
def test_a_pipeline_with_the_config_of_a_published_model(name: str) -> None:
    """PixArt and its consistency model have one config: the scheduler tells them apart."""
    pipe, known = tiny.pixart(), architecture(name)
    pipe.transformer, pipe.scheduler = known.build(), known.published_scheduler
    assert guided_by_default(pipe) is guided_by_default(name) is known.guided
    with cachekit.apply(pipe, "forecast:interval=2") as attachment:
        assert branches(attachment.plan(4)) == {1 + known.guided}
    assert branches(cachekit.estimate(pipe, (), num_inference_steps=4).plan) == {1 + known.guided}


def test_a_denoiser_that_takes_the_scale_and_one_of_no_published_model() -> None:
    pipe = tiny.sd()
    assert guided_by_default(pipe)
    pipe.scheduler = LCMScheduler()
    assert guided_by_default(pipe)
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    assert not guided_by_default(pipe)
    assert not guided_by_default(pipe.unet)
    with cachekit.apply(pipe.unet, "forecast:interval=2") as attachment:
        assert branches(attachment.plan(4)) == {1}
        assert branches(attachment.plan(4, guided=True)) == {2}
    assert guided_by_default(torch.nn.Linear(1, 1))


def test_the_plan_of_a_folder_has_its_schedulers_iterations(tmp_path: Path) -> None:
    folder = str(save_without_weights(tmp_path))
    HeunDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    shown = printed("plan", "forecast:interval=2", "--steps", 6, "--model", folder).splitlines()
    pipe = pipeline_from_config(folder)
    with cachekit.apply(pipe, "forecast:interval=2") as attachment:
        expected = f"{attachment.plan(6)}"
    assert shown == [f"{folder}: 6 steps, 11 iterations", *expected.splitlines()]
    assert "01234567890" in shown[2]
