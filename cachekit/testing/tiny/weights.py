"""Weights, sizes and the autoencoder that all tiny pipelines share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL

from cachekit.upstream.pipelines import hide_progress

#: Tokens of a prompt, and the channels of its embedding.
TOKENS, WIDTH = 7, 16


def reproducible(make: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a builder: the same random numbers at every call, and the global generator left alone."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make(*args, **kwargs)

    return made


def seeded(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw all weights anew, large enough that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


@reproducible
def vae(**changes: Any) -> AutoencoderKL:
    """Autoencoder of two resolutions: a latent is 2 x 2 pixels, with 4 channels."""
    config: dict[str, Any] = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return AutoencoderKL(**config, **changes)


def quiet(pipe: Any) -> Any:
    """Switch a pipeline's progress bar off."""
    hide_progress(pipe)
    return pipe


def without_texts(encoders: int) -> dict[str, None]:
    """Arguments of a pipeline class that leave out its text encoders and tokenizers."""
    return {f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")[:encoders]}
