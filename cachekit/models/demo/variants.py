"""Classes of diffusers' pipelines that fit the small images and the one text encoder of the embedded transformers."""

from __future__ import annotations

from functools import wraps
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from cachekit.upstream.calling import SCALE

__all__ = ["LatentConsistencyModelPipeline", "PixArtAlphaPipeline", "StableDiffusion3Pipeline", "projecting"]

#: Default scale of the latent consistency model; it has learned those from 1.5 to 5.5.
GUIDANCE = 3.5


class PixArtAlphaPipeline(diffusers.PixArtAlphaPipeline):  # type: ignore[misc]  # diffusers isn't typed
    """PixArt's pipeline with defaults for small images: no resolution bins, and the tokenizer's length of text."""

    @wraps(diffusers.PixArtAlphaPipeline.__call__)
    def __call__(self, *args: Any, **arguments: Any) -> Any:
        """Generate images."""
        own = {"use_resolution_binning": False, "clean_caption": False}
        length = {"max_sequence_length": self.tokenizer.model_max_length}
        return super().__call__(*args, **{**own, **length, **arguments})


class LatentConsistencyModelPipeline(diffusers.LatentConsistencyModelPipeline):  # type: ignore[misc]
    """The pipeline of latent consistency models with a guidance scale that the embedded one has learned, by default."""

    @wraps(diffusers.LatentConsistencyModelPipeline.__call__)
    def __call__(self, *args: Any, **arguments: Any) -> Any:
        """Generate images."""
        return super().__call__(*args, **{SCALE: GUIDANCE, **arguments})


class StableDiffusion3Pipeline(diffusers.StableDiffusion3Pipeline):  # type: ignore[misc]
    """Stable Diffusion 3's pipeline without a third encoder, for which it would have up to 256 tokens of zeros."""

    def _get_t5_prompt_embeds(
        self, prompt: Any = None, num_images_per_prompt: int = 1, *args: Any, **arguments: Any
    ) -> Tensor:
        count = num_images_per_prompt * (1 if isinstance(prompt, str) else len(prompt))
        encoder = self.text_encoder
        return torch.zeros(
            count, 0, self.transformer.config.joint_attention_dim, device=self._execution_device, dtype=encoder.dtype
        )


def projecting(encoder: CLIPTextModel) -> CLIPTextModelWithProjection:
    """Make the encoder that Stable Diffusion 3 needs from a plain one; all it adds is the identity.

    The pipeline reads the states before the last layer, so there is one more layer, and projects the pooled state.
    """
    config = {**encoder.config.to_dict(), "num_hidden_layers": encoder.config.num_hidden_layers + 1}
    made = CLIPTextModelWithProjection(CLIPTextConfig(**config)).to(encoder.dtype)
    network = made.text_model
    # transformers 4 wraps the network whose weights these are.
    network.load_state_dict(getattr(encoder, "text_model", encoder).state_dict(), strict=False)
    last = network.encoder.layers[-1]
    for layer in (last.self_attn.out_proj, last.mlp.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    nn.init.eye_(made.text_projection.weight)
    return made.eval().requires_grad_(False)
