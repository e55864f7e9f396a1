"""Write the trained parts as a diffusers pipeline in half precision, with a manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTokenizer

from cachekit.demo.pipeline import write_manifest

from .unet import NOISE_SCHEDULE, averaged


def _write(module: nn.Module, config: str, folder: Path, weights: str) -> None:
    folder.mkdir(parents=True)
    halves = {name: value.to(torch.float16).contiguous() for name, value in module.state_dict().items()}
    save_file(halves, folder / weights, {"format": "pt"})
    (folder / "config.json").write_text(config)


def _autoencoder_config(autoencoder: AutoencoderTiny) -> str:
    """Return the configuration without the one key that the class adds and then warns about."""
    config = json.loads(autoencoder.to_json_string())
    del config["block_out_channels"]
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def export(work: Path, target: Path) -> None:
    """Replace the model in `target` by the averaged weights of the last snapshot in `work`."""
    shutil.rmtree(target, ignore_errors=True)
    unet, text_encoder = averaged(work)
    autoencoder = AutoencoderTiny.from_pretrained(work / "autoencoder")
    weights = "diffusion_pytorch_model.safetensors"
    _write(unet, unet.to_json_string(), target / "unet", weights)
    _write(autoencoder, _autoencoder_config(autoencoder), target / "vae", weights)
    _write(
        text_encoder,
        text_encoder.config.to_json_string(use_diff=False),
        target / "text_encoder",
        "model.safetensors",
    )
    CLIPTokenizer.from_pretrained(work / "tokenizer").save_pretrained(target / "tokenizer")
    DPMSolverMultistepScheduler(
        **NOISE_SCHEDULE, timestep_spacing="trailing", steps_offset=1
    ).save_pretrained(target / "scheduler")
    write_manifest(target)
