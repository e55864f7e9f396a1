"""A sampling loop with TGATE's schedule, written by hand: the least that the method costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

#: A run of a loop, and the scheduler that it steps.
Run = tuple[Callable[[], Any], Any]


def loop_by_hand(pipe: Any, arguments: dict[str, Any], gate: int) -> Run:
    """Make a sampling loop: from the gate on each cross-attention returns a constant and half of the batch runs.

    Nothing is decided, counted or checked.
    """
    unet, scheduler = pipe.unet, pipe.scheduler
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    side = arguments.get("height", 0) // pipe.vae_scale_factor or unet.config.sample_size
    start = torch.randn(1, unet.config.in_channels, side, side)
    steps, scale = arguments["num_inference_steps"], arguments.get("guidance_scale", 7.5)

    def text() -> torch.Tensor:
        if "prompt" not in arguments:
            return torch.cat([arguments["negative_prompt_embeds"], arguments["prompt_embeds"]])
        caption, empty = pipe.encode_prompt(arguments["prompt"], "cpu", 1, True)
        return torch.cat([empty, caption])

    @torch.no_grad()
    def loop() -> None:
        embeddings, latents = text(), start * scheduler.init_noise_sigma
        scheduler.set_timesteps(steps)
        for step, t in enumerate(scheduler.timesteps):
            if step < gate:
                sample = scheduler.scale_model_input(torch.cat([latents, latents]), t)
                last = step == gate - 1 and gate < steps
                handles = [module.register_forward_hook(hold) for module in attentions if last]
                u, c = unet(sample, t, embeddings, return_dict=False)[0].chunk(2)
                output = u + scale * (c - u)
                for handle in handles:
                    handle.remove()
            else:
                sample = scheduler.scale_model_input(latents, t)
                output = unet(sample, t, embeddings[:1], return_dict=False)[0]
            latents = scheduler.step(output, t, latents, return_dict=False)[0]
        for module in attentions:
            vars(module).pop("forward", None)

    return loop, scheduler


def hold(module: Any, args: Any, output: torch.Tensor) -> None:
    """Make an attention return the mean of the two halves of this output from now on."""
    u, c = output.chunk(2)
    constant = (u + c) / 2
    module.forward = lambda *args, **kwargs: constant
