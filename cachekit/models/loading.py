"""Load what a command names: a model in a folder, on the hub or embedded, its scheduler, precision and device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachekit.errors import CachekitError, nearest

if TYPE_CHECKING:
    from torch import nn

#: The embedded models by the names that commands know them by.
DEMOS = {"demo": "unet", "demo-dit": "dit"}
EMBEDDED = " or ".join(map(repr, DEMOS))
DTYPES = ("float32", "float16", "bfloat16")
#: What comes of files that cannot be read, or that hold something else than diffusers expects.
_DAMAGED = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError, RuntimeError)


class ModelError(CachekitError):
    """Report a model that cannot be found or read, or that does not take what it is given."""


def skeleton(model: str) -> nn.Module:
    """Return a pipeline's denoiser, or a denoiser that stands alone, without reading or downloading weights."""
    from cachekit.upstream.pipelines import denoiser_of

    return denoiser_of(outline(model))


def outline(model: str) -> Any:
    """Return what stands for a pipeline, its parts without weights, or a denoiser that stands alone."""
    from diffusers import AutoModel, DiffusionPipeline

    if model in DEMOS:
        return pipeline(model)
    try:
        index = DiffusionPipeline.load_config(model)
        # Its class has the pipeline's name, by which errors call it.
        stand_in: Any = type(str(index["_class_name"]), (_Parts,), {})
    except _DAMAGED as error:
        try:
            alone = AutoModel.load_config(model)
        except _DAMAGED:
            raise _unreadable(model, error) from error
        return _empty(model, alone)
    return stand_in(model, index)


def pipeline(model: str, **arguments: Any) -> Any:
    """Return the pipeline in a folder or on the hub, or the embedded one; `arguments` go to its loader."""
    if model in DEMOS:
        from cachekit.models.demo import demo_pipeline

        return demo_pipeline(DEMOS[model], **arguments)
    import diffusers

    kind: Any = diffusers.DiffusionPipeline
    try:
        return kind.from_pretrained(model, **arguments)
    except _DAMAGED as error:
        raise _unreadable(model, error) from error


def call_arguments(model: str, pipe: Any) -> dict[str, Any]:
    """Return what the call of a loaded pipeline has to be told: nothing, but for some embedded ones."""
    if model not in DEMOS:
        return {}
    from cachekit.models.demo import call_arguments as embedded

    return embedded(pipe)


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

    @property
    def vae_scale_factor(self) -> int:
        """Return how many pixels a latent is along each side, as pipelines count them."""
        channels = self.vae.config.get("block_out_channels")
        if channels is None:
            raise AttributeError("vae_scale_factor")
        return int(2 ** (len(channels) - 1))

    def __getattr__(self, name: str) -> Any:
        from diffusers import AutoModel

        entry = vars(self)["_index"].get(name)
        if not isinstance(entry, (list, tuple)) or not entry or entry[0] is None:
            raise AttributeError(name)
        try:
            config = AutoModel.load_config(self._model, subfolder=name)
        except _DAMAGED as error:
            raise _unreadable(self._model, error) from error
        return _empty(self._model, config)


def _empty(model: str, config: Any) -> nn.Module:
    """Return a diffusers model with shapes only."""
    import diffusers
    import torch

    name = str(config.get("_class_name", "")) if isinstance(config, dict) else ""
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ModelError(f"model {model!r}: diffusers has no class {name!r}; load it in Python")
    try:
        with torch.device("meta"):
            denoiser: nn.Module = kind.from_config(config)
    except _DAMAGED as error:
        raise _unreadable(model, error) from error
    return denoiser


def _unreadable(model: str, error: Exception) -> ModelError:
    reason = next(iter(str(error).strip().splitlines()), "")
    if not isinstance(error, (OSError, ValueError)):
        reason = f"{type(error).__name__}: {reason}"
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        reason = "there is no such folder"
    return ModelError(f"cannot read model {model!r}: {reason} (give a folder, a hub id, or {EMBEDDED})")
