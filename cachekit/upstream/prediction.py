"""What diffusers schedulers show of a run: noise and signal at each step, and the clean sample, x0."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from cachekit.errors import GuidanceError
from cachekit.interface.moment import Time
from cachekit.upstream.schedulers import entry_of, iterations_of, planned_scheduler, shares_table

#: Pairs (alpha, sigma), one for each timestep.
Pairs = list[tuple[float | None, float | None]]
#: By scheduler, its table of alphas, and pairs by timesteps.
_known: weakref.WeakKeyDictionary[Any, tuple[Tensor, dict[tuple[float, ...], Pairs]]] = weakref.WeakKeyDictionary()
#: Most series of timesteps that are held of a table.
_MOST_KNOWN = 16


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
    time = torch.as_tensor(timestep, device=sample.device).reshape(-1)[:1]
    sigma = _sigma(table.to(sample.device), time, scheduler)[0].to(sample.dtype)
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


def times_of(scheduler: Any, timestep: Any, steps: int, negated: bool = False) -> tuple[Time, ...]:
    """List where a scheduler is in each step of a run that begins at `timestep`; empty where it has no table.

    `negated` is whether the pipeline flips the output's sign. One device sync.
    """
    table = getattr(scheduler, "timesteps", None)
    if not isinstance(table, Tensor) or table.is_meta or table.dim() != 1:
        return ()
    place = entry_of(timestep) if isinstance(timestep, Tensor) and shares_table(timestep, scheduler) else None
    first = max(len(table) - steps, 0) if place is None else place[0]
    stamps = table[first : first + steps].to("cpu", torch.float64)
    kind, scales = _scales(scheduler, stamps, first)
    kind = "" if negated else kind
    return tuple(
        Time(step, stamp, sigma, alpha, kind)
        for step, (stamp, (alpha, sigma)) in enumerate(zip(stamps.tolist(), scales))
    )


def planned_times(pipe: Any, steps: int) -> tuple[int, tuple[Time, ...]]:
    """Ask a pipeline's scheduler how many iterations a call with `num_inference_steps=steps` has, and their times.

    Without a scheduler, or with one that can't be asked, they are `steps` iterations of unknown times.
    """
    scheduler = planned_scheduler(pipe, steps)
    iterations = iterations_of(scheduler) or steps
    return iterations, times_of(scheduler, None, iterations)


def _scales(scheduler: Any, stamps: Tensor, first: int) -> tuple[str, Pairs]:
    """Find what the denoiser predicts at these timesteps, and pairs (alpha, sigma) of its sample there."""
    table, sigmas = getattr(scheduler, "alphas_cumprod", None), getattr(scheduler, "sigmas", None)
    config = getattr(scheduler, "config", {})
    kind = getattr(config, "prediction_type", "epsilon")
    unknown: Pairs = [(None, None)] * len(stamps)
    if hasattr(scheduler, "precondition_outputs") or getattr(config, "invert_sigmas", False):
        return "", unknown
    if isinstance(table, Tensor) and kind != "flow_prediction":
        return kind, _pairs(scheduler, table, tuple(stamps.tolist()))
    if not isinstance(sigmas, Tensor) or len(sigmas) < first + len(stamps):
        return "", unknown
    shares = sigmas[first : first + len(stamps)].double().cpu().tolist()
    return "flow", [(1 - share, share) for share in shares]


def _pairs(scheduler: Any, table: Tensor, stamps: tuple[float, ...]) -> Pairs:
    """Find the pairs (alpha, sigma) at these timesteps: the same in each run of a scheduler, which keeps its table."""
    if not isinstance(scheduler, Hashable):
        return _computed_pairs(table.to("cpu", torch.float64), stamps, scheduler)
    held, known = _known.get(scheduler, (None, {}))
    if held is not table:
        known = {}
        _known[scheduler] = (table, known)
    if stamps not in known:
        if len(known) >= _MOST_KNOWN:
            known.clear()
        known[stamps] = _computed_pairs(table.to("cpu", torch.float64), stamps, scheduler)
    return known[stamps]


def _computed_pairs(table: Tensor, stamps: tuple[float, ...], scheduler: Any) -> Pairs:
    ratios = _sigma(table, torch.tensor(stamps, dtype=torch.float64), scheduler).tolist()
    alphas = [1 / sqrt(1 + ratio * ratio) for ratio in ratios]
    return [(alpha, ratio * alpha) for alpha, ratio in zip(alphas, ratios)]


def _sigma(table: Tensor, time: Tensor, scheduler: Any) -> Tensor:
    """Interpolate noise over signal at timesteps, which may lie between two of those used in training."""
    if getattr(scheduler.config, "timestep_type", "") == "continuous":
        return (4 * time).exp()
    time = time.clamp(0, len(table) - 1)
    shares = table[torch.stack((time.floor(), time.ceil())).long()]
    low, high = ((1 - shares) / shares).sqrt()
    return torch.lerp(low, high, time.to(low.dtype).frac())
