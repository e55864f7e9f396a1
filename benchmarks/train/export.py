"""Export the trained models as a diffusers pipeline in half precision, with a manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTokenizer

from cachekit.models.demo.pipeline import ADDED_FILE, write_manifest

from . import lcm, unet
from .corpus import NOISE_SCHEDULE

# Includes settings that only other schedulers read, when they are made from this one's configuration.
SCHEDULER = NOISE_SCHEDULE | {
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"


def _clean(config: str) -> str:
    """Remove the folder that a configuration came from, and the one key that the autoencoder warns about."""
    loaded = json.loads(config)
    foreign = ["_name_or_path"] + ["block_out_channels"] * (loaded.get("_class_name") == "AutoencoderTiny")
    kept = {name: value for name, value in loaded.items() if name not in foreign}
    return json.dumps(kept, indent=2, sort_keys=True) + "\n"


def _write(weights: Mapping[str, Tensor], config: str, folder: Path, file: str) -> None:
    folder.mkdir(parents=True)
    halves = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
    save_file(halves, folder / file, {"format": "pt"})
    (folder / "config.json").write_text(_clean(config))


def export(work: Path, target: Path) -> None:
    """Replace the model in `target` with the averaged weights of the UNet's last snapshot in `work`."""
    shutil.rmtree(target, ignore_errors=True)
    denoiser, text_encoder = unet.averaged(work)
    autoencoder = AutoencoderTiny.from_pretrained(work / "autoencoder")
    _write(denoiser.state_dict(), denoiser.to_json_string(), target / "unet", WEIGHTS_FILE)
    _write(autoencoder.state_dict(), autoencoder.to_json_string(), target / "vae", WEIGHTS_FILE)
    _write(
        text_encoder.state_dict(),
        text_encoder.config.to_json_string(use_diff=False),
        target / "text_encoder",
        "model.safetensors",
    )
    CLIPTokenizer.from_pretrained(work / "tokenizer").save_pretrained(target / "tokenizer")
    DPMSolverMultistepScheduler.from_config(SCHEDULER).save_pretrained(target / "scheduler")
    write_manifest(target)


def export_denoiser(denoiser: Any, target: Path) -> None:
    """Replace the denoiser in `target`; the other files stay, and a flow model gets its scheduler."""
    if isinstance(denoiser, UNet2DConditionModel) and denoiser.config.time_cond_proj_dim:
        _export_lcm(denoiser, target)
        return
    folder = target / ("unet" if isinstance(denoiser, UNet2DConditionModel) else "transformer")
    shutil.rmtree(folder, ignore_errors=True)
    _write(denoiser.state_dict(), denoiser.to_json_string(), folder, WEIGHTS_FILE)
    if isinstance(denoiser, SD3Transformer2DModel):
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0).save_pretrained(target / "scheduler")
    write_manifest(target)


def _export_lcm(denoiser: Any, target: Path) -> None:
    """Replace a latent consistency model in `target`: what it adds to the UNet, and its scheduler."""
    shutil.rmtree(target, ignore_errors=True)
    _write(lcm.learned(denoiser), denoiser.to_json_string(), target / "unet", ADDED_FILE)
    LCMScheduler(**lcm.SCHEDULER).save_pretrained(target / "scheduler")
    write_manifest(target)
