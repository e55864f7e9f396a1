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

# What other schedulers need to know when they are made from this one's configuration goes with it.
SCHEDULER = NOISE_SCHEDULE | {
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def _clean(config: str) -> str:
    """Return a configuration without the folder it came from and the one key that the autoencoder warns about."""
    loaded = json.loads(config)
    foreign = ["_name_or_path"] + ["block_out_channels"] * (loaded.get("_class_name") == "AutoencoderTiny")
    kept = {name: value for name, value in loaded.items() if name not in foreign}
    return json.dumps(kept, indent=2, sort_keys=True) + "\n"


def _write(module: nn.Module, config: str, folder: Path, weights: str) -> None:
    folder.mkdir(parents=True)
    halves = {name: value.to(torch.float16).contiguous() for name, value in module.state_dict().items()}
    save_file(halves, folder / weights, {"format": "pt"})
    (folder / "config.json").write_text(_clean(config))


def export(work: Path, target: Path) -> None:
    """Replace the model in `target` by the averaged weights of the last snapshot in `work`."""
    shutil.rmtree(target, ignore_errors=True)
    unet, text_encoder = averaged(work)
    autoencoder = AutoencoderTiny.from_pretrained(work / "autoencoder")
    weights = "diffusion_pytorch_model.safetensors"
    _write(unet, unet.to_json_string(), target / "unet", weights)
    _write(autoencoder, autoencoder.to_json_string(), target / "vae", weights)
    _write(
        text_encoder,
        text_encoder.config.to_json_string(use_diff=False),
        target / "text_encoder",
        "model.safetensors",
    )
    CLIPTokenizer.from_pretrained(work / "tokenizer").save_pretrained(target / "tokenizer")
    DPMSolverMultistepScheduler.from_config(SCHEDULER).save_pretrained(target / "scheduler")
    write_manifest(target)
