"""Arguments of one forward of a denoiser, for each class whose inputs are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cachekit.models.architectures import Architecture

__all__ = ["INPUTS", "Sample"]


@dataclass(frozen=True)
class Sample:
    """Size, device and dtype of the inputs: a `batch` over all branches, and the height and width of the latents."""

    batch: int
    rows: int
    columns: int
    device: str
    dtype: torch.dtype

    def tensor(self, *shape: int) -> torch.Tensor:
        """Draw normal numbers, `(batch, *shape)`."""
        return torch.randn(self.batch, *shape, device=self.device, dtype=self.dtype)

    def filled(self, value: float) -> torch.Tensor:
        """Make one number for each entry of the batch."""
        return torch.full((self.batch,), value, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> torch.Tensor:
        """Make zeros without a dimension for the batch."""
        return torch.zeros(shape, device=self.device, dtype=self.dtype)


def _unet(known: Architecture, sample: Sample) -> dict[str, Any]:
    config, extras = known.config, dict[str, Any]()
    if config.get("addition_embed_type") == "text_time":
        extras["added_cond_kwargs"] = {"text_embeds": sample.tensor(known.pooled), "time_ids": sample.tensor(6)}
    if config.get("time_cond_proj_dim"):
        extras["timestep_cond"] = sample.tensor(config["time_cond_proj_dim"])
    return {
        "sample": sample.tensor(config["in_channels"], sample.rows, sample.columns),
        "timestep": 500,
        "encoder_hidden_states": sample.tensor(known.tokens, known.text_width),
        **extras,
    }


def _pixart(known: Architecture, sample: Sample) -> dict[str, Any]:
    sizes = {"resolution": 2, "aspect_ratio": 1}
    micro = known.config.get("use_additional_conditions", known.config["sample_size"] == 128)
    conditions = {name: torch.ones_like(sample.tensor(size)) if micro else None for name, size in sizes.items()}
    return {**_image(known, sample), "timestep": sample.filled(500).long(), "added_cond_kwargs": conditions}


def _sd3(known: Architecture, sample: Sample) -> dict[str, Any]:
    return {**_image(known, sample), "pooled_projections": sample.tensor(known.pooled), "timestep": sample.filled(500)}


def _flux(known: Architecture, sample: Sample) -> dict[str, Any]:
    guidance = {"guidance": sample.filled(3.5)} if known.config.get("guidance_embeds") else {}
    return {
        **_packed(known, sample),
        "pooled_projections": sample.tensor(known.pooled),
        "img_ids": sample.zeros(sample.rows * sample.columns, 3),
        "txt_ids": sample.zeros(known.tokens, 3),
        **guidance,
    }


def _qwen_image(known: Architecture, sample: Sample) -> dict[str, Any]:
    return {**_packed(known, sample), "img_shapes": [[(1, sample.rows, sample.columns)]] * sample.batch}


def _wan(known: Architecture, sample: Sample) -> dict[str, Any]:
    return {
        "hidden_states": sample.tensor(known.config["in_channels"], known.frames, sample.rows, sample.columns),
        "timestep": sample.filled(500),
        "encoder_hidden_states": sample.tensor(known.tokens, known.text_width),
    }


def _image(known: Architecture, sample: Sample) -> dict[str, Any]:
    """Latents `(batch, channels, height, width)` and a text."""
    return {
        "hidden_states": sample.tensor(known.config["in_channels"], sample.rows, sample.columns),
        "encoder_hidden_states": sample.tensor(known.tokens, known.text_width),
    }


def _packed(known: Architecture, sample: Sample) -> dict[str, Any]:
    """Latents packed into tokens, `(batch, height * width, channels)`, a text, and a share of the noise schedule."""
    return {
        "hidden_states": sample.tensor(sample.rows * sample.columns, known.config["in_channels"]),
        "encoder_hidden_states": sample.tensor(known.tokens, known.text_width),
        "timestep": sample.filled(0.5),
    }


#: How the arguments of each class are made.
INPUTS: dict[str, Callable[[Architecture, Sample], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen_image,
    "WanTransformer3DModel": _wan,
}
