"""Run a training stage in several single-threaded processes that average their gradients (gloo)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn


def _worker(rank: int, world: int, store: str, stage: Callable[..., None], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        stage(rank, world, *arguments)
    finally:
        dist.destroy_process_group()


def launch(world: int, stage: Callable[..., None], *arguments: Any) -> None:
    """Call `stage(rank, world, *arguments)` in `world` processes, and wait for all of them."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        spawn(_worker, (world, store, stage, arguments), nprocs=world)  # type: ignore[no-untyped-call]


def average_gradients(module: nn.Module, world: int) -> None:
    """Replace all gradients with their means over the processes, in one message."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def agree(value: float) -> float:
    """Broadcast the first process's value to all."""
    shared = torch.tensor([value], dtype=torch.float64)
    dist.broadcast(shared, 0)
    return float(shared)
