"""Facts about diffusers' context parallelism."""

from __future__ import annotations

from typing import Any

from torch import nn


def context_parallel_group(denoiser: nn.Module) -> tuple[Any, Any]:
    """Find the process group that shares the images of `denoiser`, and its device; (None, None) without one."""
    config: Any = getattr(getattr(denoiser, "_parallel_config", None), "context_parallel_config", None)
    mesh = getattr(config, "_flattened_mesh", None)
    return (None, None) if mesh is None else (mesh.get_group(), config._device)
