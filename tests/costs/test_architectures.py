"""Published architectures by name: their sizes, and what commands do with them."""

from __future__ import annotations

import json
import re
from importlib import resources

import diffusers
import pytest
from support import tiny
from support.commands import printed, run

import cachekit
from cachekit.models.architectures import architecture, architectures

#: Parameters and buffers of the published checkpoints, in billions.
SIZES = {
    "sd15": 0.86,
    "sd21": 0.87,
    "sdxl": 2.57,
    "lcm-sdxl": 2.57,
    "pixart-alpha": 0.61,
    "pixart-sigma": 0.61,
    "lcm-pixart": 0.61,
    "flux": 11.90,
    "sd3": 2.47,
    "qwen-image": 20.43,
    "wan": 1.42,
    "hunyuan-video": 12.82,
    "cogvideox": 5.57,
    "dit-xl": 0.75,  # diffusers gives each block embeddings of its own, which are one in the paper
}


@pytest.mark.parametrize("name", architectures())
def test_an_architecture_has_the_size_of_its_checkpoint(name):
    saved = architecture(name).build().state_dict()
    assert all(tensor.is_meta for tensor in saved.values())
    assert sum(tensor.numel() for tensor in saved.values()) / 1e9 == pytest.approx(SIZES[name], abs=0.006)


@pytest.mark.parametrize("name", ["qwen-image", "wan", "hunyuan-video", "dit-xl"])
def test_a_forecast_on_an_architecture_costs_its_full_steps(name):
    found = cachekit.estimate(name, "forecast:interval=3", num_inference_steps=7)
    assert found.mac_reduction == pytest.approx(7 / 3)


@pytest.mark.parametrize("name", ["lcm-pixart", "pixart-sigma", "wan"])
def test_a_denoiser_with_the_config_of_an_architecture_costs_the_same(name):
    """Configs may leave keys to the class, texts differ in length, and some layers are kept in another precision."""
    known, specs = architecture(name), "forecast:interval=2"
    alone, by_name = (
        cachekit.estimate(model, specs, num_inference_steps=2, guided=True) for model in (known.build(), name)
    )
    assert (alone.macs, alone.baseline_macs) == (by_name.macs, by_name.baseline_macs)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "hunyuan-video", "dit-xl"])
def test_commands_take_the_name_of_an_architecture(name):
    assert architecture(name).cls in printed("sites", name)
    text = printed("plan", "forecast:interval=3", "--steps", "7", "--model", name)
    assert re.search(r"^branches +([12])\1{6}$", text, re.MULTILINE)[1] == str(1 + architecture(name).guided)
    assert "forecast" in text


def test_a_misspelled_architecture_is_named():
    result = run("sites", "qwen-imag")
    assert (result.exit_code, "did you mean 'qwen-image'" in result.output) == (2, True)


@pytest.mark.parametrize("make", [tiny.flux, tiny.sd3])
def test_a_pipeline_of_these_classes_is_estimated_at_a_size(make):
    pipe = make()
    side = 16 * pipe.vae_scale_factor
    found = cachekit.estimate(pipe, "forecast:interval=3", num_inference_steps=7, height=side, width=side)
    assert found.mac_reduction == pytest.approx(7 / 3)


def test_layers_that_a_class_keeps_in_float32_stay_in_it():
    import torch

    model = architecture("wan").build(dtype=torch.bfloat16)
    assert model.scale_shift_table.dtype is torch.float32
    assert model.patch_embedding.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("HunyuanVideoTransformer3DModel", {}),
        ("HunyuanVideoTransformer3DModel", {"guidance_embeds": False, "image_condition_type": "token_replace"}),
        ("CogVideoXTransformer3DModel", {}),
        ("CogVideoXTransformer3DModel", {"use_rotary_positional_embeddings": True, "patch_size_t": 2}),
        ("CogVideoXTransformer3DModel", {"use_rotary_positional_embeddings": True, "ofs_embed_dim": 8}),
        ("DiTTransformer2DModel", {}),
    ],
)
def test_the_inputs_of_a_class_fit_its_variants(cls, options):
    config = json.loads(resources.files("cachekit.tools.coverage").joinpath("models.json").read_text())[cls]
    denoiser = getattr(diffusers, cls)(**config, **options)
    found = cachekit.estimate(denoiser, "forecast:interval=3", num_inference_steps=7)
    assert found.mac_reduction == pytest.approx(7 / 3)
