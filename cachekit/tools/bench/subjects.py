"""Load what is measured: the embedded model, a pipeline that takes a prompt, or an architecture, for times alone."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cachekit.errors import first_line, nearest
from cachekit.models.architectures import architecture, architecture_of, architectures
from cachekit.models.demo.pipeline import FIGURES, PIPELINES, folders
from cachekit.models.hub import hub_arguments
from cachekit.models.loading import move, pipeline, precision, scheduler_for
from cachekit.models.names import DEMOS, canonical, unreadable
from cachekit.tools.bench.cells import BenchError, Setting, digest
from cachekit.tools.bench.measuring import Arguments
from cachekit.tools.bench.untrained import scheduler_of, untrained_pipeline, untrained_text
from cachekit.upstream.calling import OUTPUT, SCALE, call_parameters
from cachekit.upstream.pipelines import denoiser_of, hide_progress
from cachekit.upstream.weights import dtype_of

__all__ = [
    "Subject",
    "class_of_pipeline",
    "load",
    "model_hash",
    "own_scheduler",
    "set_scheduler",
    "subject_of",
]


#: Fields of an architecture as they are for images.
_AS_IMAGES = (("latent_width", None), ("frames", 1))
#: Fields that say how a model is run by default, which a cell has in fields of its own.
_AS_RUN = ("pipeline", "scheduler", "steps")


@dataclass(frozen=True)
class Subject:
    """A loaded pipeline, its arguments for a caption, and whether its images can be checked against captions."""

    pipe: Any
    arguments: Arguments
    draws_scenes: bool = False


def load(setting: Setting) -> Subject:
    """Load the model of a setting onto its device and in its precision, and take its number of threads."""
    import torch
    from diffusers.utils.logging import disable_progress_bar

    if setting.threads:
        torch.set_num_threads(setting.threads)
    disable_progress_bar()
    if setting.model in architectures():
        pipe = untrained_pipeline(architecture(setting.model))
        pipe.to(**precision(setting.dtype))
    else:
        pipe = pipeline(setting.model, **precision(setting.dtype), **_absent(setting.model))
    move(pipe, setting.device)
    hide_progress(pipe)
    if setting.compiled:
        _compile(denoiser_of(pipe), setting.compiled)
    return subject_of(pipe, setting)


def subject_of(pipe: Any, setting: Setting) -> Subject:
    """Measure a loaded pipeline, which is called as the setting says."""
    return Subject(pipe, _arguments(pipe, setting), setting.model in DEMOS)


def _compile(denoiser: Any, backend: str) -> None:
    """Compile the repeated blocks alone: policies act around and inside them, so the whole changes with each plan."""
    import torch

    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = torch.compiler.list_backends()
        raise BenchError(f"unknown compiler backend {backend!r}{nearest(backend, known)}; known: {', '.join(known)}")
    if not getattr(denoiser, "_repeated_blocks", None):
        raise BenchError(
            f"{type(denoiser).__name__} names no blocks that repeat, so it cannot be compiled here; leave out --compile"
        )
    denoiser.compile_repeated_blocks(backend=backend)


def _absent(model: str) -> dict[str, None]:
    """Components a saved pipeline was saved without, as arguments that its loader requires."""
    from diffusers import DiffusionPipeline

    if model in DEMOS or not Path(model).is_dir():
        return {}
    index = DiffusionPipeline.load_config(model)
    return {name: None for name, entry in index.items() if isinstance(entry, (list, tuple)) and entry[0] is None}


def model_hash(model: str) -> str:
    """Digest of a model's files, or of its configuration where it is an architecture without files.

    The figures that were measured on an embedded model are no part of it.
    """
    model = canonical(model)
    if model in architectures():
        # What images lack counts for videos alone, so hashes of stored results remain valid.
        described = {key: value for key, value in asdict(architecture(model)).items() if key not in _AS_RUN}
        return digest({key: value for key, value in described.items() if (key, value) not in _AS_IMAGES})
    found = hashlib.sha256()
    for folder in _folders(model):
        for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FIGURES):
            found.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                for chunk in iter(partial(file.read, 1 << 20), b""):
                    found.update(chunk)
    return found.hexdigest()[:16]


def own_scheduler(model: str) -> Any:
    """Load a model's own scheduler, without its weights."""
    import diffusers

    model = canonical(model)
    if model in architectures():
        return scheduler_of(architecture(model))
    folder = next(folder / "scheduler" for folder in _folders(model) if (folder / "scheduler").is_dir())
    name = diffusers.DDIMScheduler.load_config(folder)["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder)


def class_of_pipeline(model: str) -> str:
    """Name of a model's pipeline class, found without loading weights."""
    model = canonical(model)
    if model in DEMOS:
        return PIPELINES[DEMOS[model]]
    if model in architectures():
        return architecture(model).pipeline
    from diffusers import DiffusionPipeline

    return str(DiffusionPipeline.load_config(model, **hub_arguments(model))["_class_name"])


def set_scheduler(pipe: Any, name: str) -> None:
    """Replace a pipeline's scheduler by a new one of that class, which carries no state of earlier runs."""
    pipe.scheduler = scheduler_for(pipe, name)


def _folders(model: str) -> tuple[Path, ...]:
    """Folders of a model's files; the first that has a scheduler has its own."""
    if model in DEMOS:
        return folders(DEMOS[model])
    if Path(model).is_dir():
        return (Path(model),)
    from diffusers import DiffusionPipeline

    hub = hub_arguments(model)
    try:
        return (Path(DiffusionPipeline.download(model, **hub)),)
    except (OSError, ValueError) as error:
        raise unreadable(model, first_line(error)) from error


# -- how a pipeline is called -----------------------------------------------------------------------------


def _arguments(pipe: Any, setting: Setting) -> Arguments:
    from cachekit.models.demo import DEMO_GUIDANCE

    known = call_parameters(pipe)
    if "prompt" not in known:
        raise BenchError(f"{type(pipe).__name__} takes no prompt; only pipelines that read text can be measured")
    scale = setting.guidance
    if scale is None and setting.model in DEMOS:
        scale = DEMO_GUIDANCE
    if scale is None and setting.model in architectures():
        scale = 5.0 if architecture(setting.model).guided else 1.0
    fixed = {"height": setting.height, "width": setting.width, SCALE: scale}
    given: dict[str, Any] = {name: value for name, value in fixed.items() if value is not None}
    given[OUTPUT] = "latent" if setting.model in architectures() else "pil"
    if getattr(pipe, "tokenizer", None) is not None:
        return lambda prompt: {"prompt": prompt, **given}
    dtype = dtype_of(denoiser_of(pipe))
    text = partial(untrained_text, architecture_of(denoiser_of(pipe)), device=pipe.device, dtype=dtype)
    return lambda prompt: {**text(int(digest(prompt)[:12], 16)), **given}
