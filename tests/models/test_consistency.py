"""The distillation of the latent consistency model: what is learned, stored and loaded."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from cachekit.models.demo import demo_pipeline
from cachekit.models.demo.pipeline import load_pipeline

export, lcm = (import_module(f"benchmarks.train.{name}") for name in ("export", "lcm"))
SCALES = torch.tensor([1.5, 3.5])


@pytest.fixture(scope="module")
def teacher():
    return demo_pipeline("unet").unet


@pytest.fixture
def student(teacher):
    torch.manual_seed(0)
    return lcm.build(teacher)


def inputs():
    generator = torch.Generator().manual_seed(1)
    latents, hidden = (torch.randn(size, generator=generator) for size in ((2, 8, 16, 16), (2, 28, 96)))
    return latents, torch.tensor([999, 500]), hidden


@torch.no_grad()
def predicted(unet):
    return unet(*inputs(), timestep_cond=lcm.embed(SCALES)).sample


def test_guidance_scales_are_embedded_as_in_the_pipeline():
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    torch.testing.assert_close(lcm.embed(SCALES), embed(None, SCALES - 1, embedding_dim=lcm.GUIDANCE_WIDTH))


def test_it_starts_as_the_teacher(teacher, student):
    with torch.no_grad():
        expected = teacher(*inputs()).sample
    torch.testing.assert_close(predicted(student), expected)


def test_what_it_learns_is_exported_and_loaded(teacher, student, tmp_path):
    latents, _, hidden = inputs()
    batch, loss = SimpleNamespace(latents=latents, hidden=hidden), lcm.Consistency(teacher, hidden[:1], latents.device)
    before, learned = predicted(student), [one for one in student.parameters() if one.requires_grad]
    for _ in range(2):
        torch.autograd.backward(loss(student, batch))
        with torch.no_grad():
            for one in learned:
                one.copy_((one - 0.01 * one.grad.sign()).half())
    after = predicted(student)
    assert (after - before).abs().max() > 0.01
    export.export_denoiser(student, tmp_path / "lcm")
    torch.testing.assert_close(predicted(load_pipeline(tmp_path / "lcm").unet), after)


def test_at_the_end_of_a_trajectory_the_data_is_what_is_given(teacher, student):
    latents, _, hidden = inputs()
    loss = lcm.Consistency(teacher, hidden[:1], latents.device)
    end = torch.full((2,), -1)
    assert torch.equal(loss._predict(student, latents, end, hidden, lcm.embed(SCALES)), latents)
