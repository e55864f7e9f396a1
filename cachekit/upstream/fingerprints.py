"""Recognise a model and a scheduler again: digests of weights, and settings."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Any

import torch
from torch import Tensor, nn

#: How many values of each parameter are read.
_VALUES = 16
#: Settings of schedulers that describe the file they came from.
_SKIPPED = ("self", "kwargs", "trained_betas")


def fingerprint(denoiser: nn.Module) -> str:
    """Compute a digest of a model's parameters: their names and shapes, and some values of each.

    The values are rounded to bfloat16, so that weights loaded in single or half precision have the digest of those in
    bfloat16. It is "" where the weights are not in memory, as with sequential offloading.
    """
    found = hashlib.sha256()
    parts = []
    for name, parameter in denoiser.named_parameters():
        if parameter.is_meta:
            return ""
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        parts.append(_values(parameter.detach()))
    for device in sorted({part.device for part in parts}, key=str):
        values = torch.cat([part for part in parts if part.device == device]).cpu()
        found.update(values.view(torch.int16).numpy().tobytes())
    return found.hexdigest()[:16]


def _values(parameter: Tensor) -> Tensor:
    flat = parameter.reshape(-1)
    return flat[:: max(1, len(flat) // _VALUES)][:_VALUES].to(torch.bfloat16)


def settings_of(scheduler: Any) -> dict[str, str]:
    """List the settings that a scheduler's class takes, as text by name; those of other classes are left out."""
    config = dict(getattr(scheduler, "config", None) or {})
    taken = inspect.signature(type(scheduler).__init__).parameters
    kept = {name: value for name, value in config.items() if name in taken and name not in _SKIPPED}
    return {name: json.dumps(value, default=str) for name, value in sorted(kept.items())}
