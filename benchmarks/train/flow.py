"""The embedded model of joint attention and rectified flow, before its training: an SD3 transformer."""

from __future__ import annotations

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from .text import WIDTH

HEADS, HEAD_WIDTH, BLOCKS = 3, 64, 7


def build() -> SD3Transformer2DModel:
    """Build the untrained transformer; every block starts as the identity, and the output as zero."""
    width = HEADS * HEAD_WIDTH
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=8,
        out_channels=8,
        num_layers=BLOCKS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    modulations = [layer for name, layer in model.named_modules() if name.endswith(("norm1.linear", "context.linear"))]
    for layer in (*modulations, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def draw_times(n: int, device: torch.device) -> Tensor:
    """Sample n times from 0 (data) to 1 (noise): mostly somewhat later than the middle, some uniformly."""
    middle = torch.sigmoid(0.3 + torch.randn(n, device=device))
    return torch.where(torch.rand(n, device=device) < 0.15, torch.rand(n, device=device), middle)


def loss(model: nn.Module, latents: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
    """Compute the squared error of the velocity, noise minus data, at a random time of each of `(n, 8, 16, 16)`."""
    times, noise = draw_times(len(latents), latents.device), torch.randn_like(latents)
    share = times[:, None, None, None]
    with torch.autocast(latents.device.type, torch.bfloat16):
        given = {"encoder_hidden_states": hidden, "pooled_projections": pooled, "timestep": 1000 * times}
        velocity = model((1 - share) * latents + share * noise, **given).sample
    return functional.mse_loss(velocity.float(), noise - latents)
