"""Denoisers of published models, built from their configs without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import nn

from cachekit.errors import CachekitError, nearest

#: Default number of pixels per latent along each side, as in the autoencoders of Stable Diffusion.
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Architecture:
    """Class, config and inputs of one published denoiser."""

    name: str
    #: Name of the class in diffusers.
    cls: str
    config: dict[str, Any]
    #: Length and width of the text embeddings: `(batch, tokens, text_width)`.
    tokens: int
    text_width: int
    #: Height and width of the latents at the model's own size.
    latent: int
    #: Whether the model is published with classifier-free guidance, that is two branches.
    guided: bool
    pixels_per_latent: int = PIXELS_PER_LATENT

    def build(self, device: str = "meta", dtype: torch.dtype = torch.float16) -> nn.Module:
        """Build the denoiser, with random weights unless it is on the meta device."""
        import diffusers

        with torch.device(device):
            model: nn.Module = getattr(diffusers, self.cls).from_config(self.config)
        # diffusers' own `to` warns about layers that should stay in float32.
        return nn.Module.to(model, dtype).eval()

    def inputs(
        self,
        batch: int,
        height: int | None = None,
        width: int | None = None,
        device: str = "meta",
        dtype: torch.dtype = torch.float16,
    ) -> dict[str, Any]:
        """Make the arguments of one forward for a `batch` over all branches, of height x width pixels.

        Raises `CachekitError` for a size that is not a multiple of `pixels_per_latent`.
        """
        rows, columns = (self._latents(size) for size in (height, width))

        def tensor(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        channels = self.config["in_channels"]
        sample, text = tensor(batch, channels, rows, columns), tensor(batch, self.tokens, self.text_width)
        if self.cls == "PixArtTransformer2DModel":
            return {"hidden_states": sample, "encoder_hidden_states": text, **self._pixart_extras(batch, device, dtype)}
        extras: dict[str, Any] = {}
        if self.config.get("addition_embed_type") == "text_time":
            pooled = self.config["projection_class_embeddings_input_dim"] - 6 * self.config["addition_time_embed_dim"]
            extras["added_cond_kwargs"] = {"text_embeds": tensor(batch, pooled), "time_ids": tensor(batch, 6)}
        if self.config.get("time_cond_proj_dim"):
            extras["timestep_cond"] = tensor(batch, self.config["time_cond_proj_dim"])
        return {"sample": sample, "timestep": 500, "encoder_hidden_states": text, **extras}

    def _latents(self, pixels: int | None) -> int:
        """Convert a size from pixels to latents; None is the model's own size."""
        if pixels is None:
            return self.latent
        if pixels % self.pixels_per_latent:
            raise CachekitError(f"a size of {pixels} pixels: give a multiple of {self.pixels_per_latent}")
        return pixels // self.pixels_per_latent

    def _pixart_extras(self, batch: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
        sizes = {"resolution": 2, "aspect_ratio": 1}
        micro = self.config.get("use_additional_conditions", self.config["sample_size"] == 128)
        return {
            "timestep": torch.full((batch,), 500, device=device),
            "added_cond_kwargs": {
                name: torch.ones(batch, size, device=device, dtype=dtype) if micro else None
                for name, size in sizes.items()
            },
        }


@cache
def architectures() -> dict[str, Architecture]:
    """Read the table of known architectures, by name."""
    table = json.loads(resources.files("cachekit.models").joinpath("architectures.json").read_text())
    return {name: Architecture(name, row.pop("class"), **row) for name, row in sorted(table.items())}


def architecture(name: str) -> Architecture:
    """Look up an architecture by name.

    Raises `CachekitError` with the nearest known name.
    """
    known = architectures()
    if name not in known:
        raise CachekitError(f"unknown model {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]


def architecture_of(denoiser: nn.Module, pixels_per_latent: int = PIXELS_PER_LATENT) -> Architecture:
    """Describe a loaded denoiser.

    Raises `CachekitError` for a class whose inputs aren't known.
    """
    name, config = type(denoiser).__name__, dict(getattr(denoiser, "config", {}))
    if name == "UNet2DConditionModel":
        tokens, text_width = 77, config["cross_attention_dim"]
    elif name == "PixArtTransformer2DModel":
        tokens, text_width = 120, config["caption_channels"]
    else:
        raise CachekitError(f"the inputs of {name} are not known: give inputs= with the arguments of one forward")
    latent = config["sample_size"]
    return Architecture(name, name, config, tokens, text_width, latent, True, pixels_per_latent)
