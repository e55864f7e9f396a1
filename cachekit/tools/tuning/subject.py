"""What a model offers caching, found from its config without running it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachekit.interface.presets import Evidence, Preset, shipped
from cachekit.models.architectures import Architecture, architecture, guided_by_default, recognised
from cachekit.models.demo import DEMO_GUIDANCE, demo_steps
from cachekit.models.loading import class_of, default_scale, default_steps, pipeline_from_config
from cachekit.models.names import DEMOS, canonical, is_architecture
from cachekit.registry.catalog import installed
from cachekit.upstream.fingerprints import fingerprint
from cachekit.upstream.guidance import takes_scale
from cachekit.upstream.pipelines import denoiser_of, names_branches
from cachekit.upstream.schedulers import adds_noise, is_high_order, scheduler_of

if TYPE_CHECKING:
    from torch import nn

    from cachekit.interface.sites import SiteMap

#: Steps of a run where nothing else gives their number.
_STEPS = 25


@dataclass(frozen=True)
class Subject:
    """A model, its denoiser and a run of it, as far as configs show them.

    `source` is the pipeline, or the name of an architecture, that an estimate takes. `scheduler` is "" where none is
    known, `weights` is the digest of the denoiser's weights, "" where they aren't loaded. `high_order` is whether the
    scheduler's order is above one. `scale` is the guidance scale that is asked for, or that a guided pipeline has by
    default, read for such schedulers and embedded models alone; else None.
    """

    model: str
    source: Any
    denoiser: nn.Module
    adapter: str
    sites: SiteMap
    architecture: Architecture | None
    scheduler: str
    noisy: bool
    high_order: bool
    steps: int
    guidance: str
    guided: bool
    scale: float | None
    weights: str

    @classmethod
    def of(cls, model: str, steps: int | None = None, scale: float | None = None) -> Subject:
        """Describe a model by the name of an architecture, a folder, a hub id, or the name of an embedded one.

        Steps and guidance scale are by default the pipeline's own.

        Raises `CachekitError` where it can't be read, or has no adapter.
        """
        source: Any = architecture(model).name if is_architecture(model) else pipeline_from_config(model)
        named = architecture(model) if isinstance(source, str) else None
        denoiser = named.build() if named else denoiser_of(source)
        own = None if named else scheduler_of(source)
        known = named or recognised(denoiser, type(own).__name__)
        scheduler = known.published_scheduler if own is None and known else own
        adapter = installed().adapter_for(denoiser)
        guided = guided_by_default(source, scale)
        # Importing a pipeline's class takes seconds.
        kind = functools.cache(lambda: class_of(source, known.pipeline if known else ""))
        high_order = is_high_order(scheduler)
        apart = guided and (bool(adapter.layout(denoiser).calls) or _names_branches(kind()))
        return cls(
            model=model,
            source=source,
            denoiser=denoiser,
            adapter=adapter.name,
            sites=adapter.sites(denoiser),
            architecture=known,
            scheduler=type(scheduler).__name__ if scheduler is not None else "",
            noisy=adds_noise(scheduler),
            high_order=high_order,
            steps=steps or _steps(model, known, kind),
            guidance=_guidance(denoiser, guided, apart),
            guided=guided,
            scale=_scale(model, high_order, kind) if guided and scale is None else scale,
            weights=fingerprint(denoiser),
        )


def _steps(model: str, known: Architecture | None, kind: Callable[[], type[Any] | None]) -> int:
    if canonical(model) in DEMOS:
        return demo_steps(canonical(model))
    if known:
        return known.steps
    made = kind()
    return (default_steps(made) if made else None) or _STEPS


def _scale(model: str, is_needed: bool, kind: Callable[[], type[Any] | None]) -> float | None:
    if canonical(model) in DEMOS:
        return DEMO_GUIDANCE
    made = kind() if is_needed else None
    return default_scale(made) if made else None


def _names_branches(kind: type[Any] | None) -> bool:
    return kind is not None and names_branches(kind)


def _guidance(denoiser: nn.Module, guided: bool, apart: bool) -> str:
    if guided:
        return f"two guidance branches {'with a call each' if apart else 'in one batch'}"
    return "the guidance scale is an input, no branches" if takes_scale(denoiser) else "no guidance"


def presets_for(subject: Subject) -> dict[str, Preset]:
    """Find the presets that ship for a model: those of its weights, else of its architecture, else of its class.

    An embedded model has none but those of its weights: what was published for large models is not for it.
    """
    loaded = {name: Preset.load(path) for name, path in shipped().items()}
    kind, known = type(subject.denoiser).__name__, subject.architecture
    embedded = canonical(subject.model) in DEMOS
    tests: tuple[Callable[[Evidence], bool], ...] = (
        lambda evidence: bool(subject.weights) and evidence.model == subject.weights,
        lambda evidence: known is not None and evidence.architecture == known.name,
        lambda evidence: known is None and not embedded and evidence.denoiser == kind and evidence.model is None,
    )
    chosen = ({name: one for name, one in loaded.items() if test(one.evidence)} for test in tests)
    return next(filter(None, chosen), {})
