"""Weights of LoRAs, drawn at random."""

from __future__ import annotations

from typing import Any

import torch


def weights(unet: Any, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 for some attentions and convolutions of a UNet without any."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in unet.named_modules():
        if name.endswith(("attn2.to_q", "attn1.to_v", "resnets.0.conv1")):
            outer, inner, *kernel = module.weight.shape
            ones = [1] * len(kernel)
            found[f"unet.{name}.lora_A.weight"] = torch.randn(2, inner, *kernel, generator=generator)
            found[f"unet.{name}.lora_B.weight"] = torch.randn(outer, 2, *ones, generator=generator) / 8
    return found
