"""Arguments of one forward of a denoiser, for each class whose inputs are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["INPUTS", "Sample"]


@dataclass(frozen=True)
class Sample:
    """What the inputs depend on: the denoiser's config, lengths and widths, and the size, device and dtype."""

    config: dict[str, Any]
    #: Length and width of the text, and width of the pooled text.
    text: tuple[int, int]
    pooled: int
    #: Entries over all branches, then frames, height and width of the latents.
    batch: int
    frames: int
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


def _unet(sample: Sample) -> dict[str, Any]:
    config, extras = sample.config, dict[str, Any]()
    if config.get("addition_embed_type") == "text_time":
        extras["added_cond_kwargs"] = {"text_embeds": sample.tensor(sample.pooled), "time_ids": sample.tensor(6)}
    if config.get("time_cond_proj_dim"):
        extras["timestep_cond"] = sample.tensor(config["time_cond_proj_dim"])
    return {
        "sample": sample.tensor(config["in_channels"], sample.rows, sample.columns),
        "timestep": 500,
        "encoder_hidden_states": sample.tensor(*sample.text),
        **extras,
    }


def _pixart(sample: Sample) -> dict[str, Any]:
    sizes = {"resolution": 2, "aspect_ratio": 1}
    own = sample.config.get("use_additional_conditions")
    micro = sample.config["sample_size"] == 128 if own is None else own
    conditions = {name: torch.ones_like(sample.tensor(size)) if micro else None for name, size in sizes.items()}
    return {**_image(sample), "timestep": sample.filled(500).long(), "added_cond_kwargs": conditions}


def _sd3(sample: Sample) -> dict[str, Any]:
    return {**_image(sample), "pooled_projections": sample.tensor(sample.pooled), "timestep": sample.filled(500)}


def _flux(sample: Sample) -> dict[str, Any]:
    guidance = {"guidance": sample.filled(3.5)} if sample.config.get("guidance_embeds") else {}
    return {
        **_packed(sample),
        "pooled_projections": sample.tensor(sample.pooled),
        "img_ids": sample.zeros(sample.rows * sample.columns, 3),
        "txt_ids": sample.zeros(sample.text[0], 3),
        **guidance,
    }


def _qwen_image(sample: Sample) -> dict[str, Any]:
    return {**_packed(sample), "img_shapes": [[(1, sample.rows, sample.columns)]] * sample.batch}


def _wan(sample: Sample) -> dict[str, Any]:
    return {
        "hidden_states": sample.tensor(sample.config["in_channels"], sample.frames, sample.rows, sample.columns),
        "timestep": sample.filled(500),
        "encoder_hidden_states": sample.tensor(*sample.text),
    }


def _hunyuan_video(sample: Sample) -> dict[str, Any]:
    guidance = {"guidance": sample.filled(6000)} if sample.config.get("guidance_embeds") else {}
    return {
        "hidden_states": sample.tensor(sample.config["in_channels"], sample.frames, sample.rows, sample.columns),
        "timestep": sample.filled(500),
        "encoder_hidden_states": sample.tensor(*sample.text),
        "encoder_attention_mask": torch.ones_like(sample.tensor(sample.text[0])),
        "pooled_projections": sample.tensor(sample.pooled),
        **guidance,
    }


def _cogvideox(sample: Sample) -> dict[str, Any]:
    config, extras = sample.config, dict[str, Any]()
    size, length = config["patch_size"], config.get("patch_size_t") or 1
    patches = -(-sample.frames // length)
    if config.get("use_rotary_positional_embeddings"):
        tokens = patches * (sample.rows // size) * (sample.columns // size)
        extras["image_rotary_emb"] = (sample.zeros(tokens, config["attention_head_dim"]),) * 2
    if config.get("ofs_embed_dim"):
        extras["ofs"] = sample.filled(2)
    return {
        # The pipeline fills up the last patch of frames.
        "hidden_states": sample.tensor(patches * length, config["in_channels"], sample.rows, sample.columns),
        "encoder_hidden_states": sample.tensor(config["max_text_seq_length"], sample.text[1]),
        "timestep": sample.filled(500),
        **extras,
    }


def _dit(sample: Sample) -> dict[str, Any]:
    return {
        "hidden_states": sample.tensor(sample.config["in_channels"], sample.rows, sample.columns),
        "timestep": sample.filled(500).long(),
        "class_labels": sample.filled(1).long(),
    }


def _image(sample: Sample) -> dict[str, Any]:
    """Latents `(batch, channels, height, width)` and a text."""
    return {
        "hidden_states": sample.tensor(sample.config["in_channels"], sample.rows, sample.columns),
        "encoder_hidden_states": sample.tensor(*sample.text),
    }


def _packed(sample: Sample) -> dict[str, Any]:
    """Latents packed into tokens, `(batch, height * width, channels)`, a text, and a share of the noise schedule."""
    return {
        "hidden_states": sample.tensor(sample.rows * sample.columns, sample.config["in_channels"]),
        "encoder_hidden_states": sample.tensor(*sample.text),
        "timestep": sample.filled(0.5),
    }


#: How the arguments of each class are made.
INPUTS: dict[str, Callable[[Sample], dict[str, Any]]] = {
    "UNet2DConditionModel": _unet,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen_image,
    "WanTransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "CogVideoXTransformer3DModel": _cogvideox,
    "DiTTransformer2DModel": _dit,
}
