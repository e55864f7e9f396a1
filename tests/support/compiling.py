"""Tiny pipelines that compile quickly, ways to compile them, and a backend that counts graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import cachekit
from support import tiny

STEPS = 5


class Graphs:
    """A backend of torch.compile that counts its graphs and runs them uncompiled."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


# -- pipelines --------------------------------------------------------------------------------------------


def pixart(layers: int = 1) -> Any:
    return tiny.pixart(layers=layers)


def convolutions(**changes: Any) -> Any:
    """SD without attention: the quickest to compile of the pipelines with regions to skip."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "mid_block_type": None}
    return tiny.sd(**{"block_out_channels": (8, 8), "layers_per_block": 1, **blocks, **changes})


def unet() -> Any:
    """SD with attention in its middle block alone."""
    return convolutions(mid_block_type="UNetMidBlock2DCrossAttn")


def flux() -> Any:
    return tiny.flux(layers=(1, 2))


def draw(pipe: Any) -> torch.Tensor:
    return tiny.latents(pipe, steps=STEPS)


# -- ways to compile --------------------------------------------------------------------------------------


def blocks(pipe: Any, **how: Any) -> None:
    denoiser = tiny.denoiser_of(pipe)
    if denoiser._repeated_blocks:
        denoiser.compile_repeated_blocks(**how)
    else:  # PixArt names none
        for block in denoiser.transformer_blocks:
            block.compile(**how)


def in_place(pipe: Any, **how: Any) -> None:
    tiny.denoiser_of(pipe).compile(**how)


def module(pipe: Any, **how: Any) -> None:
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    setattr(pipe, name, torch.compile(getattr(pipe, name), **how))


def forward(pipe: Any, **how: Any) -> None:
    denoiser = tiny.denoiser_of(pipe)
    denoiser.forward = torch.compile(denoiser.forward, **how)


Way = Callable[..., None]


# -- what is counted --------------------------------------------------------------------------------------


def counts(attachment: Any) -> list[tuple[int, ...]]:
    return [(count.computed, count.stored, count.reused, count.missed) for count in attachment.report().counts]


def eager(pipe: Any, specs: Any) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Cached image of a denoiser that is not compiled, and its counts."""
    with cachekit.apply(pipe, specs) as attachment:
        return draw(pipe), counts(attachment)
