"""Train the UNet and the text encoder on cached latents: v-prediction, captions dropped for guidance."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from cachekit.demo import scenes

from .autoencoder import LATENT_STD
from .data import load_captions
from .parallel import agree, average_gradients, launch
from .text import WIDTH, Heads, targets, tokenize

NOISE_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}
CAPTION_DROPOUT = 0.12
EMA_DECAY = 0.997
HEADS_WEIGHT = 0.02
THINGS_WEIGHT = (1.0, 1.5, 3.0)


def build() -> UNet2DConditionModel:
    """Return the untrained UNet: 16 x 16, 8 x 8 and 4 x 4, cross-attention at the two lower resolutions."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


@dataclass(frozen=True)
class Settings:
    """Say how long and how fast to train."""

    seconds: float
    batch: int = 32
    rate: float = 9e-4
    warm_up: int = 150
    snapshot_seconds: float = 450


def _weight(text: str) -> float:
    """Return how often a caption is drawn: more often for more things, never if scenes no longer have one."""
    things = scenes.parse(text).things
    return THINGS_WEIGHT[len(things) - 1] if all(map(scenes.is_drawn, things)) else 0.0


class Corpus:
    """Draw batches of latents, tokens and what the captions say."""

    def __init__(self, work: Path, tokenizer: CLIPTokenizer, seed: list[int]) -> None:
        """Map the latents and tokenize every caption once."""
        self.latents = np.load(work / "latents.npy", mmap_mode="r")
        self.captions = load_captions(work)
        self.tokens = tokenize(tokenizer, self.captions)
        self.empty = tokenize(tokenizer, [""])[0]
        self.rng = np.random.default_rng(seed)
        weights = np.array([_weight(text) for text in self.captions])
        self.chances = np.cumsum(weights / weights.sum())

    def batch(self, n: int) -> tuple[Tensor, Tensor, list[str]]:
        """Return n x 8 x 16 x 16 latents, n x 28 tokens and the captions."""
        drawn = np.searchsorted(self.chances, self.rng.random(n))
        chosen = np.minimum(np.sort(drawn), len(self.captions) - 1)
        latents = torch.from_numpy(self.latents[chosen].astype(np.float32)) * LATENT_STD
        return latents, self.tokens[torch.from_numpy(chosen)], [self.captions[index] for index in chosen]


def draw_timesteps(n: int) -> Tensor:
    """Draw n timesteps: two thirds around 450, where shapes and places are decided, the rest anywhere."""
    middle = (450 + 190 * torch.randn(n)).round().long()
    anywhere = torch.randint(0, 1000, (n,))
    outside = (middle < 0) | (middle > 999) | (torch.rand(n) < 1 / 3)
    return torch.where(outside, anywhere, middle)


class Learner(nn.Module):
    """Hold everything that is trained, and compute its loss."""

    def __init__(self, work: Path) -> None:
        """Build the UNet, and load the text encoder and its heads from their own training."""
        super().__init__()
        self.unet = build()
        self.unet.set_attn_processor(AttnProcessor())
        self.text = CLIPTextModel.from_pretrained(work / "text_encoder")
        self.heads = Heads()
        self.heads.load_state_dict(torch.load(work / "heads.pt"))
        self.noise = DDPMScheduler(**NOISE_SCHEDULE)

    def losses(self, corpus: Corpus, n: int) -> tuple[Tensor, Tensor]:
        """Return the error of the predicted velocity, and that of the text heads."""
        latents, tokens, captions = corpus.batch(n)
        hidden = self.text(tokens).last_hidden_state
        aside = self.heads(hidden, *targets(captions))
        empty = self.text(corpus.empty[None]).last_hidden_state
        hidden = torch.where(torch.rand(n, 1, 1) < CAPTION_DROPOUT, empty, hidden)
        noise, timesteps = torch.randn_like(latents), draw_timesteps(n)
        noisy = self.noise.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.unet(noisy, timesteps, encoder_hidden_states=hidden).sample
        return functional.mse_loss(velocity.float(), self.noise.get_velocity(latents, noise, timesteps)), aside


class Average:
    """Keep an exponential moving average of the weights."""

    def __init__(self, module: nn.Module) -> None:
        """Start from the weights as they are."""
        self.weights = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the present weights, faster during the first steps."""
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        for name, value in module.named_parameters():
            self.weights[name].lerp_(value, 1 - decay)


def save(work: Path, name: str, state: dict[str, Any]) -> None:
    """Write a checkpoint in one move, so that a reader never sees half of one."""
    part = work / f"{name}.part"
    torch.save(state, part)
    part.replace(work / f"{name}.pt")


class Run:
    """Train for a fixed time, one cosine schedule; what was stopped goes on from its last snapshot."""

    def __init__(self, rank: int, work: Path, settings: Settings) -> None:
        """Build the learner and resume where there is a snapshot."""
        torch.manual_seed(3)
        self.rank, self.work, self.settings = rank, work, settings
        self.learner = Learner(work)
        self.optimiser = torch.optim.AdamW(
            self.learner.parameters(), lr=0, weight_decay=1e-3, betas=(0.9, 0.99), fused=True
        )
        self.average = Average(self.learner)
        self.step, self.elapsed = 0, 0.0
        if (work / "snapshot.pt").exists():
            self._resume()
        torch.manual_seed(1000 * self.step + rank)
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.corpus = Corpus(work, tokenizer, [3, self.step, rank])

    def _resume(self) -> None:
        state = torch.load(self.work / "snapshot.pt", weights_only=True)
        self.learner.load_state_dict(state["learner"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average.weights = state["average"]
        self.step, self.elapsed = state["step"], state["elapsed"]

    def _snapshot(self) -> None:
        state: dict[str, Any] = {"learner": self.learner.state_dict(), "average": self.average.weights}
        state |= {"optimiser": self.optimiser.state_dict(), "step": self.step, "elapsed": self.elapsed}
        save(self.work, "snapshot", state)

    def _rate(self, done: float) -> float:
        rise = min(1.0, (self.step + 1) / self.settings.warm_up)
        return self.settings.rate * rise * 0.5 * (1 + float(np.cos(np.pi * min(done, 1))))

    def _one_step(self, world: int, done: float) -> tuple[float, float]:
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(done)
        loss, aside = self.learner.losses(self.corpus, self.settings.batch)
        self.optimiser.zero_grad()
        torch.autograd.backward(loss + HEADS_WEIGHT * aside)
        average_gradients(self.learner, world)
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0, foreach=True)
        self.optimiser.step()
        if self.rank == 0:
            self.average.update(self.learner, self.step)
        self.step += 1
        return loss.item(), aside.item()

    def _tell(self, done: float, losses: list[tuple[float, float]], speed: float) -> None:
        velocity, aside = np.mean(losses, axis=0)
        share = f"{100 * done:.1f} %"
        print(f"unet step {self.step} at {share}: {velocity:.4f} text {aside:.4f} {speed:.0f}/s", flush=True)

    def train(self, world: int) -> None:
        """Step until the time is up; snapshots on the way."""
        last = time.monotonic()
        start, saved = last - self.elapsed, last
        losses: list[tuple[float, float]] = []
        while (done := agree(self.elapsed / self.settings.seconds)) < 1:
            losses.append(self._one_step(world, done))
            now = time.monotonic()
            self.elapsed = now - start
            if self.rank == 0 and self.step % 100 == 0:
                self._tell(done, losses[-100:], world * self.settings.batch * 100 / (now - last))
                last = now
            if self.rank == 0 and now - saved > self.settings.snapshot_seconds:
                self._snapshot()
                saved = now
        if self.rank == 0:
            self._snapshot()


def _train(rank: int, world: int, work: Path, settings: Settings) -> None:
    Run(rank, work, settings).train(world)


def train(work: Path, seconds: float, processes: int) -> None:
    """Train for `seconds`; the averaged weights are in work/snapshot.pt."""
    launch(processes, _train, work, Settings(seconds))


def averaged(work: Path) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Return the UNet and the text encoder with the averaged weights of the last snapshot."""
    learner = Learner(work)
    state = torch.load(work / "snapshot.pt", weights_only=True)
    learner.load_state_dict(state["learner"])
    learner.load_state_dict(state["average"], strict=False)
    learner.unet.set_default_attn_processor()
    return learner.unet.eval(), learner.text.eval()
