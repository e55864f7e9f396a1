"""Facts about diffusers' context parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn


def context_parallel_group(denoiser: nn.Module) -> tuple[Any, Any]:
    """Find the process group that shares the images of `denoiser`, and its device; (None, None) without one."""
    config: Any = getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    return (None, None) if mesh is None else (mesh.get_group(), config._device)


@contextmanager
def sharing(denoiser: nn.Module, group: Any) -> Iterator[None]:
    """Mark `denoiser` as one that shares its images with the other ranks of `group`; nothing of it is split."""
    mesh = SimpleNamespace(get_group=lambda: group)
    parallel = SimpleNamespace(_flattened_mesh=mesh, _device=next(denoiser.parameters()).device)
    before = getattr(denoiser, "_parallel_config", None)
    vars(denoiser)["_parallel_config"] = SimpleNamespace(context_parallel_config=parallel)
    try:
        yield
    finally:
        vars(denoiser)["_parallel_config"] = before
