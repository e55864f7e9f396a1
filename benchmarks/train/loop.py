"""Train a denoiser for a fixed time: one cosine schedule, averaged weights, snapshots to resume from.

Time is CPU time of each process, so that other work on the machine delays the training without shortening it.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .corpus import Corpus
from .parallel import agree, average_gradients, launch

EMA_DECAY = 0.997


class Learner(nn.Module):
    """The modules to train and their loss. Frozen modules aren't registered, so that snapshots stay small."""

    @abstractmethod
    def losses(self, corpus: Corpus, n: int) -> tuple[Tensor, dict[str, float]]:
        """Compute the loss over a batch of n, and the figures to print."""


@dataclass(frozen=True)
class Settings:
    """What to train, the name of its snapshot, how long (in CPU seconds) and at which rate."""

    name: str
    learner: Callable[[Path], Learner]
    seconds: float
    snapshot: str = "snapshot"
    batch: int = 32
    rate: float = 9e-4
    warm_up: int = 150
    decay: float = EMA_DECAY
    snapshot_seconds: float = 120


class Average:
    """Exponential moving average of a module's weights."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start from the present weights."""
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the present weights, faster during the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.named_parameters():
            self.weights[name].lerp_(value, 1 - decay)


def save(work: Path, name: str, state: dict[str, Any]) -> None:
    """Write a checkpoint and move it into place, so that no reader ever sees half of one."""
    part = work / f"{name}.part"
    torch.save(state, part)
    part.replace(work / f"{name}.pt")


def load_averaged(work: Path, snapshot: str, learner: Learner) -> None:
    """Load the averaged weights of the last snapshot into a learner."""
    state = torch.load(work / f"{snapshot}.pt", weights_only=True)
    learner.load_state_dict(state["learner"])
    learner.load_state_dict(state["average"], strict=False)


class Run:
    """One training run, in one of its processes; it resumes from its last snapshot."""

    def __init__(self, rank: int, work: Path, settings: Settings) -> None:
        """Build the learner, and resume where there is a snapshot."""
        torch.manual_seed(3)
        self.rank, self.work, self.settings = rank, work, settings
        self.learner = settings.learner(work)
        self.optimiser = torch.optim.AdamW(
            self.learner.parameters(), lr=0, weight_decay=1e-3, betas=(0.9, 0.99), fused=True
        )
        self.average = Average(self.learner, settings.decay)
        self.step, self.elapsed = 0, 0.0
        if (work / f"{settings.snapshot}.pt").exists():
            self._resume()
        torch.manual_seed(1000 * self.step + rank)
        self.corpus = Corpus(work, [3, self.step, rank])

    def _resume(self) -> None:
        state = torch.load(self.work / f"{self.settings.snapshot}.pt", weights_only=True)
        self.learner.load_state_dict(state["learner"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.average.weights = state["average"]
        self.step, self.elapsed = state["step"], state["elapsed"]

    def _snapshot(self) -> None:
        state: dict[str, Any] = {"learner": self.learner.state_dict(), "average": self.average.weights}
        state |= {"optimiser": self.optimiser.state_dict(), "step": self.step, "elapsed": self.elapsed}
        save(self.work, self.settings.snapshot, state)

    def _rate(self, done: float) -> float:
        rise = min(1.0, (self.step + 1) / self.settings.warm_up)
        return self.settings.rate * rise * 0.5 * (1 + float(np.cos(np.pi * min(done, 1))))

    def _one_step(self, world: int, done: float) -> dict[str, float]:
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(done)
        loss, figures = self.learner.losses(self.corpus, self.settings.batch)
        self.optimiser.zero_grad()
        torch.autograd.backward(loss)
        average_gradients(self.learner, world)
        nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0, foreach=True)
        self.optimiser.step()
        if self.rank == 0:
            self.average.update(self.learner, self.step)
        self.step += 1
        return figures

    def _print(self, done: float, figures: list[dict[str, float]], speed: float) -> None:
        means = " ".join(f"{name} {np.mean([one[name] for one in figures]):.4f}" for name in figures[0])
        share = f"{100 * done:.1f} %"
        print(f"{self.settings.name} step {self.step} at {share}: {means} {speed:.0f}/s", flush=True)

    def train(self, world: int) -> None:
        """Train until the time is up, with snapshots on the way."""
        printed = saved = self.elapsed
        start = time.process_time() - self.elapsed
        figures: list[dict[str, float]] = []
        while (done := agree(self.elapsed / self.settings.seconds)) < 1:
            figures = [*figures[-99:], self._one_step(world, done)]
            self.elapsed = time.process_time() - start
            if self.rank > 0:
                continue
            if self.step % 100 == 0:
                self._print(done, figures, world * self.settings.batch * len(figures) / (self.elapsed - printed))
                printed = self.elapsed
            if self.elapsed - saved > self.settings.snapshot_seconds:
                self._snapshot()
                saved = self.elapsed
        if self.rank == 0:
            self._snapshot()


def _train(rank: int, world: int, work: Path, settings: Settings) -> None:
    Run(rank, work, settings).train(world)


def train(work: Path, settings: Settings, processes: int) -> None:
    """Train in several processes; the averaged weights are in the snapshot."""
    launch(processes, _train, work, settings)
