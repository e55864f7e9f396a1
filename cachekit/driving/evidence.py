"""Compare pipelines and runs with what the evidence of a preset is for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from cachekit.errors import PresetWarning
from cachekit.interface.presets import Evidence, Preset
from cachekit.models.architectures import recognised
from cachekit.upstream.fingerprints import fingerprint
from cachekit.upstream.scales import scale_of
from cachekit.upstream.schedulers import scheduler_of


def warn_of_pipeline(preset: Preset, pipe: Any, denoiser: nn.Module) -> None:
    """Warn where the model or the scheduler is another; a scale or steps are known when a run begins."""
    _warn(preset, _of_pipeline(preset.evidence, pipe, denoiser), "the pipeline")


def warn_of_run(preset: Preset, steps: int | None, arguments: Mapping[str, Any]) -> None:
    """Warn where a run has another number of steps or another scale of guidance."""
    _warn(preset, _of_run(preset.evidence, steps, arguments), "the run")


def _of_pipeline(evidence: Evidence, pipe: Any, denoiser: nn.Module) -> Iterator[str]:
    kind, pipeline, scheduler = type(denoiser).__name__, type(pipe).__name__, scheduler_of(pipe)
    # What is modular, or a bare denoiser, has other names for the same model.
    if evidence.denoiser and kind != evidence.denoiser:
        yield f"the denoiser {kind}, not {evidence.denoiser}"
    elif evidence.model:
        found = fingerprint(denoiser)
        if found and found != evidence.model:
            yield f"the model {found}, not {evidence.model}"
    elif evidence.architecture:
        # A bare denoiser has no scheduler to tell a distilled model of the same config by.
        known = recognised(denoiser, (evidence.scheduler or "") if scheduler is None else type(scheduler).__name__)
        if known is None or known.name != evidence.architecture:
            yield f"{f'the model {known.name}' if known else 'an unknown model'}, not {evidence.architecture}"
    if evidence.pipeline and not evidence.denoiser and pipeline != evidence.pipeline:
        yield f"the class {pipeline}, not {evidence.pipeline}"
    if evidence.scheduler and scheduler is not None and type(scheduler).__name__ != evidence.scheduler:
        yield f"the scheduler {type(scheduler).__name__}, not {evidence.scheduler}"


def _of_run(evidence: Evidence, steps: int | None, arguments: Mapping[str, Any]) -> Iterator[str]:
    scale = scale_of(arguments) if arguments else None
    if evidence.steps and steps and steps != evidence.steps:
        yield f"{steps} steps, not {evidence.steps}"
    if evidence.guidance is not None and scale is not None and abs(scale - evidence.guidance) > 1e-6:
        yield f"guidance scale {scale:g}, not {evidence.guidance:g}"


def _warn(preset: Preset, differences: Iterator[str], what: str) -> None:
    found = ", ".join(differences)
    if found:
        specs = " + ".join(preset.specs)
        message = f"preset of {specs}: {what} has {found}, which its evidence is for; tune anew with cachekit tune"
        warnings.warn(message, PresetWarning, stacklevel=2)
