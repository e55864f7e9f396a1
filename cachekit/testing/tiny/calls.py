"""Prompts and arguments of short calls of the tiny pipelines."""

from __future__ import annotations

import functools
from typing import Any

import torch

from cachekit.testing.tiny.weights import TOKENS, WIDTH
from cachekit.upstream.calling import results_of


@functools.cache
def text(batch: int, width: int = WIDTH, seed: int = 3) -> torch.Tensor:
    """Embeddings of prompts, `(batch, tokens, channels)`."""
    return torch.randn(batch, TOKENS, width, generator=torch.Generator().manual_seed(seed))


def picture(batch: int = 1) -> torch.Tensor:
    """Images of 32 x 32 pixels, `(batch, channels, height, width)`."""
    return torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def arguments(pipe: Any, steps: int = 6, batch: int = 1, guidance: float = 5.0, seed: int = 0) -> dict[str, Any]:
    """Arguments of a call that gives latents, for each of the tiny pipelines."""
    common = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(seed)}
    name = type(pipe).__name__
    if name == "StableVideoDiffusionPipeline":
        image = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(9))
        sizes = {"height": 16, "width": 16, "num_frames": 2, "output_type": "latent"}
        return {**common, **sizes, "image": image, "max_guidance_scale": guidance, "min_guidance_scale": 1.0}
    if name == "DiTPipeline":
        return {**common, "class_labels": list(range(batch)), "guidance_scale": guidance, "output_type": "pt"}
    return {**common, "guidance_scale": guidance, "output_type": "latent", **_prompts(name, batch), **_rest(pipe)}


def _prompts(name: str, batch: int) -> dict[str, Any]:
    prompt, negative = text(batch), text(batch, seed=4)
    given = {"prompt_embeds": prompt}
    if name.startswith(("StableDiffusionXL", "StableDiffusion3", "Flux")):
        given |= {"pooled_prompt_embeds": prompt[:, 0]}
    if name.startswith("Flux"):
        # Without the negative prompt of its true guidance, it has one branch.
        return given
    given |= {"negative_prompt_embeds": negative}
    if name.startswith(("StableDiffusionXL", "StableDiffusion3")):
        given |= {"negative_pooled_prompt_embeds": negative[:, 0]}
    if name.startswith("PixArt"):
        mask = torch.ones(batch, TOKENS)
        mask[:, 5:] = 0
        given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": torch.ones(batch, TOKENS)}
        return {**given, "negative_prompt": None}
    return given


def _rest(pipe: Any) -> dict[str, Any]:
    """Arguments that only some of the classes take: sizes, and the images of ControlNets."""
    name = type(pipe).__name__
    if name.startswith("PixArt"):
        side = pipe.vae_scale_factor * 16
        return {"height": side, "width": side, "use_resolution_binning": False}
    if name.startswith(("StableDiffusion3", "Flux")):
        return {"height": 16, "width": 16}
    if name == "WanPipeline":
        return {"height": 32, "width": 32, "num_frames": 5}
    if name == "StableDiffusionControlNetPipeline":
        nets = getattr(pipe.controlnet, "nets", None)
        return {"image": [picture()] * len(nets) if nets else picture()}
    return {}


def latents(pipe: Any, **changes: Any) -> torch.Tensor:
    """Call the pipeline with `arguments(pipe, ...)` and what else is given; its latents, or a DiT's images."""
    known = {key: changes.pop(key) for key in ("steps", "batch", "guidance", "seed") if key in changes}
    return drawn(pipe, {**arguments(pipe, **known), **changes})


def drawn(pipe: Any, given: dict[str, Any]) -> torch.Tensor:
    """Call a pipeline; its latents `(batch, ...)`, or a DiT's images."""
    # The DiTPipeline of older releases of diffusers returns an array, whatever the output type.
    return torch.as_tensor(results_of(pipe(**given)))
