"""What a model offers caching, found from its config without running it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cachekit.interface.presets import Evidence, Preset, shipped
from cachekit.models.architectures import Architecture, architecture, recognised
from cachekit.models.demo import DEMO_STEPS
from cachekit.models.loading import DEMOS, is_architecture, pipeline_from_config
from cachekit.registry.catalog import installed
from cachekit.upstream.fingerprints import fingerprint
from cachekit.upstream.pipelines import default_steps, denoiser_of, names_branches
from cachekit.upstream.schedulers import adds_noise, scheduler_of

if TYPE_CHECKING:
    from torch import nn

    from cachekit.interface.sites import SiteMap

#: Steps of a run where nothing else gives their number.
_STEPS = 25
#: Keys of a config by which a denoiser takes the guidance scale as an embedding, and so has no branches.
_EMBEDDED_SCALE = ("guidance_embeds", "time_cond_proj_dim")


@dataclass(frozen=True)
class Subject:
    """A model, its denoiser and a run of it, as far as configs show them.

    `source` is the pipeline, or the name of an architecture, that an estimate takes. `scheduler` is "" where none is
    known, `weights` is the digest of the denoiser's weights, "" where they aren't loaded.
    """

    model: str
    source: Any
    denoiser: nn.Module
    adapter: str
    sites: SiteMap
    architecture: Architecture | None
    scheduler: str
    noisy: bool
    steps: int
    guidance: str
    guided: bool
    weights: str

    @classmethod
    def of(cls, model: str, steps: int | None = None) -> Subject:
        """Describe a model by the name of an architecture, a folder, a hub id, or the name of an embedded one.

        Raises `CachekitError` where it can't be read, or has no adapter.
        """
        source: Any = architecture(model).name if is_architecture(model) else pipeline_from_config(model)
        named = architecture(model) if isinstance(source, str) else None
        denoiser = named.build() if named else denoiser_of(source)
        own = None if named else scheduler_of(source)
        known = named or recognised(denoiser, type(own).__name__)
        kind = _pipeline_class(source, known)
        scheduler = own if own is not None else _published_scheduler(known)
        adapter = installed().adapter_for(denoiser)
        guided = known.guided if known else not _embeds_scale(denoiser)
        apart = bool(adapter.layout(denoiser).calls) or (kind is not None and names_branches(kind))
        return cls(
            model=model,
            source=source,
            denoiser=denoiser,
            adapter=adapter.name,
            sites=adapter.sites(denoiser),
            architecture=known,
            scheduler=type(scheduler).__name__ if scheduler is not None else "",
            noisy=adds_noise(scheduler),
            steps=steps or _steps(model, known, kind),
            guidance=_guidance(denoiser, guided, apart),
            guided=guided,
            weights=fingerprint(denoiser),
        )


def _pipeline_class(source: Any, known: Architecture | None) -> type[Any] | None:
    """Find the class of diffusers that runs the model; None for a bare denoiser that isn't a known architecture."""
    import diffusers

    names = [type(source).__name__, *([known.pipeline] if known else [])]
    found = (getattr(diffusers, name, None) for name in names if name.endswith("Pipeline"))
    return next((kind for kind in found if kind is not None), None)


def _published_scheduler(known: Architecture | None) -> Any:
    """Make a scheduler of the class that an architecture is published with."""
    import diffusers

    return getattr(diffusers, known.scheduler)() if known else None


def _steps(model: str, known: Architecture | None, kind: type[Any] | None) -> int:
    if model in DEMOS:
        return DEMO_STEPS
    return (known.steps if known else None) or (default_steps(kind) if kind else None) or _STEPS


def _embeds_scale(denoiser: nn.Module) -> bool:
    config = getattr(denoiser, "config", None) or {}
    return any(config.get(key) for key in _EMBEDDED_SCALE)


def _guidance(denoiser: nn.Module, guided: bool, apart: bool) -> str:
    if guided:
        return f"two guidance branches {'with a call each' if apart else 'in one batch'}"
    return "the guidance scale is an input, no branches" if _embeds_scale(denoiser) else "no guidance"


def presets_for(subject: Subject) -> dict[str, Preset]:
    """Find the presets that ship for a model: those of its weights, else of its architecture, else of its class."""
    loaded = {name: Preset.load(path) for name, path in shipped().items()}
    kind, known = type(subject.denoiser).__name__, subject.architecture
    tests: tuple[Callable[[Evidence], bool], ...] = (
        lambda evidence: bool(subject.weights) and evidence.model == subject.weights,
        lambda evidence: known is not None and evidence.architecture == known.name,
        lambda evidence: known is None and evidence.denoiser == kind and evidence.model is None,
    )
    chosen = ({name: one for name, one in loaded.items() if test(one.evidence)} for test in tests)
    return next(filter(None, chosen), {})
