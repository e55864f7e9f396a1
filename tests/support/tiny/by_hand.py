"""TGATE and narrowed guidance written out, without cachekit, for tests to compare with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class TgateByHand:
    """TGATE on a denoiser of its own: with the mode "reuse", every `attn2` gives what was kept."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.mode = ""
        self.kept: dict[str, torch.Tensor] = {}
        for name, module in denoiser.named_modules():
            if name.endswith(".attn2"):
                module.forward = functools.partial(self.stand_in, name, module.forward)

    def stand_in(self, name: str, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.mode == "reuse":
            return self.kept[name]
        output = original(*args, **kwargs)
        if self.mode == "keep the mean":
            self.kept[name] = sum(output.chunk(2)) / 2
        if self.mode == "keep":
            self.kept[name] = output
        return output


def guide(both: torch.Tensor, scale: float = 5.0) -> torch.Tensor:
    """Combine the unconditional and the conditional half into the guided prediction."""
    u, c = both.chunk(2)
    return u + scale * (c - u)


def cut(value: Any, half: int) -> Any:
    """Cut every tensor in `value` down to one half of its batch."""
    if isinstance(value, torch.Tensor) and value.dim():
        return value.chunk(2)[half]
    if isinstance(value, dict):
        # Masks are of images, whose branches share them.
        return {key: item if key == "ip_adapter_masks" else cut(item, half) for key, item in value.items()}
    return type(value)(cut(item, half) for item in value) if isinstance(value, (list, tuple)) else value


def narrowed_by_hand(pipe: Any, m: int, half: int, gated: bool = False) -> Any:
    """Make the denoiser of `pipe` run one half of its inputs after m calls, with TGATE if `gated`."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    attention = TgateByHand(denoiser) if gated else None
    whole, calls = denoiser.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if attention:
            attention.mode = "reuse" if calls > m else "keep the mean" if calls == m else ""
        if calls <= m:
            return whole(*args, **kwargs)
        return tuple(torch.cat([part] * 2) for part in whole(*cut(args, half), **cut(kwargs, half)))

    denoiser.forward = forward
    return pipe
