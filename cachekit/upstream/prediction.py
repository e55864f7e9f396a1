"""Predict the clean sample, x0, from a denoiser's output under diffusers schedulers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cachekit.errors import GuidanceError


def predict_x0(sample: Tensor, output: Tensor, timestep: Any, scheduler: Any) -> Tensor:
    """Predict x0 from the denoiser's scaled input and its output, both `(batch, channels, ...)`.

    Sigma-based schedulers give the denoiser x / sqrt(sigma^2 + 1), which is the variance-preserving sample of the
    same timestep, so one formula serves them and the schedulers with alphas. Rectified flows use x - sigma v.

    Raises `GuidanceError` for a scheduler with neither sigmas nor alphas, for one that turns the output into a
    prediction by itself (EDM), and for samples of integers.
    """
    table, sigmas = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "sigmas", None)
    is_known = isinstance(table, Tensor) or isinstance(sigmas, Tensor)
    if not is_known or hasattr(scheduler, "precondition_outputs") or not sample.is_floating_point():
        raise GuidanceError(f"x0 is not known from outputs under {type(scheduler).__name__}; compare predictions (eps)")
    prediction = getattr(scheduler.config, "prediction_type", "epsilon")
    if table is None or prediction == "flow_prediction":
        flow: Tensor = sample - _flow_sigma(scheduler).to(sample) * output
        return flow
    time = torch.as_tensor(timestep, device=sample.device).reshape(-1)[0]
    sigma = _sigma(table.to(sample.device), time, scheduler).to(sample.dtype)
    signal, noise = (1 + sigma**2).rsqrt(), sigma * (1 + sigma**2).rsqrt()
    if prediction == "v_prediction":
        clean: Tensor = signal * sample - noise * output
    else:
        clean = output if prediction == "sample" else (sample - noise * output) / signal
    return clean


def _flow_sigma(scheduler: Any) -> Tensor:
    """Read the share of noise at the current step from the scheduler: pipelines scale a flow's timesteps differently.

    With inverted sigmas, which are shares of the clean sample, outputs point towards it and the share is negative.
    """
    index = getattr(scheduler, "step_index", None)
    share: Tensor = scheduler.sigmas[(getattr(scheduler, "begin_index", None) or 0) if index is None else index]
    return share - 1 if getattr(scheduler.config, "invert_sigmas", False) else share


def _sigma(table: Tensor, time: Tensor, scheduler: Any) -> Tensor:
    """Interpolate noise over signal at a timestep, which may lie between two of those used in training."""
    if getattr(scheduler.config, "timestep_type", "") == "continuous":
        return (4 * time).exp()
    sigmas = ((1 - table) / table).sqrt()
    time = time.clamp(0, len(table) - 1)
    low, high = sigmas[time.floor().long()], sigmas[time.ceil().long()]
    return torch.lerp(low, high, time.to(low.dtype).frac())
