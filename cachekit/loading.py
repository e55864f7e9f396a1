"""Load what a command names: a model in a folder, on the hub or embedded, its scheduler, precision and device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CachekitError, nearest

if TYPE_CHECKING:
    from torch import nn

DEMO = "demo"
DTYPES = ("float32", "float16", "bfloat16")


class ModelError(CachekitError):
    """Report a model that cannot be found or read, or that does not take what it is given."""


def skeleton(model: str) -> nn.Module:
    """Return a pipeline's denoiser, or a denoiser that stands alone, without reading or downloading weights."""
    from diffusers import AutoModel, DiffusionPipeline

    from .pipelines import denoiser_of

    if model == DEMO:
        return denoiser_of(pipeline(DEMO))
    try:
        index = DiffusionPipeline.load_config(model)
    except (OSError, ValueError) as error:
        try:
            return _empty(model, AutoModel.load_config(model))
        except (OSError, ValueError):
            raise _unreadable(model, error) from error
    # Its class has the pipeline's name, by which errors call it.
    stand_in: Any = type(str(index["_class_name"]), (_Parts,), {})
    return denoiser_of(stand_in(model, index))


def pipeline(model: str, **arguments: Any) -> Any:
    """Return the pipeline in a folder or on the hub, or the embedded one; `arguments` go to its loader."""
    if model == DEMO:
        from .demo import demo_pipeline

        return demo_pipeline(**arguments)
    import diffusers

    kind: Any = diffusers.DiffusionPipeline
    try:
        return kind.from_pretrained(model, **arguments)
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(model, error) from error


def precision(name: str | None) -> dict[str, Any]:
    """Return the loader's arguments for a precision given by name."""
    import torch

    if name is None:
        return {}
    if name not in DTYPES:
        raise ModelError(f"unknown dtype {name!r}; allowed: {', '.join(DTYPES)}")
    return {"torch_dtype": getattr(torch, name)}


def scheduler_for(pipe: Any, name: str) -> Any:
    """Return the scheduler of that name with the settings of the pipeline's own."""
    known = {kind.__name__: kind for kind in pipe.scheduler.compatibles}
    kind = known.get(name) or known.get(f"{name}Scheduler")
    if kind is None:
        allowed = ", ".join(sorted(known))
        raise ModelError(f"unknown scheduler {name!r}{nearest(name, known)}; {type(pipe).__name__} takes: {allowed}")
    return kind.from_config(pipe.scheduler.config)


def move(pipe: Any, device: str | None) -> None:
    """Move a pipeline to a device, or to cuda where present."""
    import torch

    try:
        pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error


class _Parts:
    """Stand in for a pipeline: make a part from its configuration alone when it is asked for."""

    def __init__(self, model: str, index: dict[str, Any]) -> None:
        self._model = model
        self._index = index

    def __getattr__(self, name: str) -> nn.Module:
        from diffusers import AutoModel

        entry = vars(self)["_index"].get(name)
        if not isinstance(entry, (list, tuple)) or entry[0] is None:
            raise AttributeError(name)
        return _empty(self._model, AutoModel.load_config(self._model, subfolder=name))


def _empty(model: str, config: Any) -> nn.Module:
    """Return a diffusers model with shapes only."""
    import diffusers
    import torch

    name = str(config.get("_class_name", ""))
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ModelError(f"model {model!r}: diffusers has no class {name!r}; load it in Python")
    with torch.device("meta"):
        denoiser: nn.Module = kind.from_config(config)
    return denoiser


def _unreadable(model: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0]
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        reason = "there is no such folder"
    return ModelError(f"cannot read model {model!r}: {reason} (give a folder, a hub id, or {DEMO!r})")
