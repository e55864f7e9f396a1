"""A modular SDXL pipeline of tiny parts."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks
from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise, denoise

from support import tiny

STEPS = 5


class Blocks(SequentialPipelineBlocks):
    """The part of SDXL's modular pipeline from embeddings to latents."""

    model_name = "stable-diffusion-xl"
    block_classes = [
        before_denoise.StableDiffusionXLInputStep,
        before_denoise.StableDiffusionXLSetTimestepsStep,
        before_denoise.StableDiffusionXLPrepareLatentsStep,
        before_denoise.StableDiffusionXLPrepareAdditionalConditioningStep,
        denoise.StableDiffusionXLDenoiseStep,
    ]
    block_names = ["input", "timesteps", "latents", "conditions", "denoise"]


def modular(guider: Any) -> Any:
    """Modular pipeline of the parts of `tiny.sdxl`, with this guider."""
    source = tiny.sdxl()
    pipe = Blocks().init_pipeline()
    pipe.update_components(unet=source.unet, vae=source.vae, scheduler=source.scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def _classic() -> Any:
    return tiny.sdxl()


def draw(pipe: Any) -> torch.Tensor:
    """Latents of `STEPS` steps, from the arguments that `tiny.latents` gives the classic pipeline."""
    given = tiny.arguments(_classic(), steps=STEPS)
    for unknown in ("guidance_scale", "output_type"):
        del given[unknown]
    return pipe(**given, height=32, width=32, output="latents")
