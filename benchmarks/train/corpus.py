"""Training data of the denoisers: cached latents, tokens of their captions, timesteps and noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from cachekit.models.demo import scenes

from .autoencoder import LATENT_STD
from .data import load_captions
from .text import tokenize

NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
CAPTION_DROPOUT = 0.12
THINGS_WEIGHT = (1.0, 1.5, 3.0)


def weigh(text: str) -> float:
    """Weigh a caption: more for more things, 0 where scenes no longer have one of them."""
    things = scenes.parse(text).things
    return THINGS_WEIGHT[len(things) - 1] if all(map(scenes.is_drawn, things)) else 0.0


class Corpus:
    """Source of random batches of latents, tokens and captions."""

    def __init__(self, work: Path, seed: list[int]) -> None:
        """Memory-map the latents, and tokenize all captions once."""
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.latents = np.load(work / "latents.npy", mmap_mode="r")
        self.captions = load_captions(work)
        self.tokens = tokenize(tokenizer, self.captions)
        self.empty = tokenize(tokenizer, [""])[0]
        self.rng = np.random.default_rng(seed)
        weights = np.array([weigh(text) for text in self.captions])
        self.chances = np.cumsum(weights / weights.sum())

    def batch(self, n: int) -> tuple[Tensor, Tensor, list[str]]:
        """Sample n x 8 x 16 x 16 latents, n x 28 tokens and the captions."""
        drawn = np.searchsorted(self.chances, self.rng.random(n))
        chosen = np.minimum(np.sort(drawn), len(self.captions) - 1)
        latents = torch.from_numpy(self.latents[chosen].astype(np.float32)) * LATENT_STD
        return latents, self.tokens[torch.from_numpy(chosen)], [self.captions[index] for index in chosen]


def draw_timesteps(n: int, device: torch.device | None = None) -> Tensor:
    """Sample n timesteps: two thirds around 450, where shapes and places are decided, the rest uniformly."""
    middle = (450 + 190 * torch.randn(n, device=device)).round().long()
    anywhere = torch.randint(0, 1000, (n,), device=device)
    outside = (middle < 0) | (middle > 999) | (torch.rand(n, device=device) < 1 / 3)
    return torch.where(outside, anywhere, middle)
