"""Build the denoisers of published models from their true configs, with shapes only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import nn

from cachekit.errors import CachekitError, nearest

#: Pixels per latent where nobody says it: what all autoencoders of Stable Diffusion have.
PIXELS_PER_LATENT = 8


@dataclass(frozen=True)
class Architecture:
    """Describe one published denoiser: diffusers class, config, text, and whether it runs two branches."""

    name: str
    cls: str
    config: dict[str, Any]
    tokens: int
    text_width: int
    latent: int
    guided: bool
    pixels_per_latent: int = PIXELS_PER_LATENT

    def build(self, device: str = "meta", dtype: torch.dtype = torch.float16) -> nn.Module:
        """Return the denoiser; on the meta device it takes no memory."""
        import diffusers

        with torch.device(device):
            model: nn.Module = getattr(diffusers, self.cls).from_config(self.config)
        # diffusers' own `to` warns of layers to be kept in float32; here nothing has values.
        return nn.Module.to(model, dtype).eval()

    def inputs(
        self,
        batch: int,
        height: int | None = None,
        width: int | None = None,
        device: str = "meta",
        dtype: torch.dtype = torch.float16,
    ) -> dict[str, Any]:
        """Return the arguments of one forward for `batch` samples (branches included) of height x width pixels."""
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
        """Return how many latents lie along so many pixels, the model's own number where it is None."""
        if pixels is None:
            return self.latent
        if pixels % self.pixels_per_latent:
            raise CachekitError(f"a size of {pixels} pixels is no multiple of the {self.pixels_per_latent} of a latent")
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
    """Return the known architectures by name."""
    table = json.loads(resources.files("cachekit.models").joinpath("architectures.json").read_text())
    return {name: Architecture(name, row.pop("class"), **row) for name, row in sorted(table.items())}


def architecture(name: str) -> Architecture:
    """Return one architecture by name; raise `CachekitError` with the nearest match for an unknown one."""
    known = architectures()
    if name not in known:
        raise CachekitError(f"unknown model {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]


def architecture_of(denoiser: nn.Module, pixels_per_latent: int = PIXELS_PER_LATENT) -> Architecture:
    """Return the architecture of a denoiser at hand; raise `CachekitError` where its inputs are not known."""
    name, config = type(denoiser).__name__, dict(getattr(denoiser, "config", {}))
    if name == "UNet2DConditionModel":
        tokens, text_width = 77, config["cross_attention_dim"]
    elif name == "PixArtTransformer2DModel":
        tokens, text_width = 120, config["caption_channels"]
    else:
        raise CachekitError(f"the inputs of {name} are not known: give inputs= with the arguments of one forward")
    latent = config["sample_size"]
    return Architecture(name, name, config, tokens, text_width, latent, True, pixels_per_latent)
