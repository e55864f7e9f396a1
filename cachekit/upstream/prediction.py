"""Predict the clean sample, x0, from a denoiser's output under diffusers schedulers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cachekit.errors import GuidanceError


def predict_x0(sample: Tensor, output: Tensor, timestep: Any, scheduler: Any) -> Tensor:
    """Return x0 from the denoiser's scaled input and output, both `(batch, channels, ...)`.

    Sigma-based schedulers hand the denoiser x / sqrt(sigma^2 + 1), which is the variance-preserving sample of
    the same timestep, so one formula serves both kinds; rectified flows use x - sigma v. Raise `GuidanceError`
    for a scheduler that has neither of both, makes its prediction of the output by itself (EDM), or for samples of
    whole numbers.
    """
    table, sigmas = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "sigmas", None)
    known = isinstance(table, Tensor) or isinstance(sigmas, Tensor)
    if not known or hasattr(scheduler, "precondition_outputs") or not sample.is_floating_point():
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
    """Return the share of noise at the present step; pipelines give denoisers its time in several scales.

    Where sigmas are shares of the clean sample, and outputs point to it, the share of noise is negative.
    """
    index = getattr(scheduler, "step_index", None)
    share: Tensor = scheduler.sigmas[(getattr(scheduler, "begin_index", None) or 0) if index is None else index]
    return share - 1 if getattr(scheduler.config, "invert_sigmas", False) else share


def _sigma(table: Tensor, time: Tensor, scheduler: Any) -> Tensor:
    """Return noise over signal at a timestep, which may lie between two of the training's."""
    if getattr(scheduler.config, "timestep_type", "") == "continuous":
        return (4 * time).exp()
    sigmas = ((1 - table) / table).sqrt()
    time = time.clamp(0, len(table) - 1)
    low, high = sigmas[time.floor().long()], sigmas[time.ceil().long()]
    return torch.lerp(low, high, time.to(low.dtype).frac())
