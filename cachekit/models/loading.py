"""Load models from a folder, the hub or the package itself, and set their scheduler, precision and device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachekit.errors import first_line, nearest
from cachekit.models.hub import hub_arguments
from cachekit.models.names import ModelError, Sort, is_architecture, named, unreadable, without_weights
from cachekit.upstream.calling import SCALE, STEPS, call_parameters

if TYPE_CHECKING:
    from torch import nn

#: Short names of schedulers: the first class of each that a pipeline takes.
SCHEDULERS = {
    "euler": ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "dpm++": ("DPMSolverMultistepScheduler",),
    "unipc": ("UniPCMultistepScheduler",),
    "ddim": ("DDIMScheduler",),
}
DTYPES = ("float32", "float16", "bfloat16")
#: Errors that diffusers raises for files that are missing, damaged or not what it expects.
_DAMAGED = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AssertionError, AttributeError, RuntimeError)


def denoiser_from_config(model: str) -> nn.Module:
    """Build the denoiser of a model on the meta device; weights are neither read nor downloaded.

    `model` is the name of an architecture, or what `pipeline_from_config` takes. An embedded model is loaded with its
    weights. Raises `ModelError` as `pipeline_from_config` does.
    """
    from cachekit.models.architectures import architecture
    from cachekit.upstream.pipelines import denoiser_of

    if is_architecture(model):
        return architecture(model).build()
    return denoiser_of(pipeline_from_config(model))


def pipeline_from_config(model: str) -> Any:
    """Make a stand-in for a pipeline whose components are built on the meta device when they are accessed.

    Where `model` is a denoiser without a pipeline, that is built instead; an embedded model is loaded with its weights.
    Raises `ModelError` where there is no such model or diffusers lacks its class.
    """
    found = named(model)
    if found.sort is Sort.EMBEDDED:
        return pipeline(model)
    hub = hub_arguments(model)
    from diffusers import AutoModel, DiffusionPipeline  # takes seconds, so only once the hub has answered

    try:
        index = DiffusionPipeline.load_config(model, **hub)
        # Errors name the class, so the stand-in's has the name of the pipeline's.
        stand_in: Any = type(str(index["_class_name"]), (_ComponentsFromConfig,), {})
    except _DAMAGED as error:
        try:
            alone = AutoModel.load_config(model, **hub)
        except _DAMAGED:
            raise _unreadable(model, error) from error
        return _on_meta(model, alone)
    return stand_in(model, index, hub)


def pipeline(model: str, **arguments: Any) -> Any:
    """Load the pipeline in a folder or on the hub, or an embedded one; `arguments` go to `from_pretrained`.

    Raises `ModelError` where it can't be read, and for an architecture, which has no weights.
    """
    found = named(model)
    if found.sort is Sort.EMBEDDED:
        from cachekit.models.demo import demo_pipeline

        return demo_pipeline(found.kind, **arguments)
    if found.sort is Sort.ARCHITECTURE:
        raise without_weights(model)
    hub = hub_arguments(model, arguments.get("cache_dir"))
    import diffusers

    kind: Any = diffusers.DiffusionPipeline
    try:
        return kind.from_pretrained(model, **{**hub, **arguments})
    except _DAMAGED as error:
        raise _unreadable(model, error) from error


def ready(
    model: str, scheduler: str | None = None, device: str | None = None, dtype: str | None = None, **arguments: Any
) -> Any:
    """Load a pipeline with `pipeline`, with a scheduler by name, on a device, in a precision.

    Raises `ModelError` where the model can't be read, or doesn't take one of these.
    """
    pipe = pipeline(model, **precision(dtype), **arguments)
    if scheduler:
        pipe.scheduler = scheduler_for(pipe, scheduler)
    move(pipe, device)
    return pipe


def class_of(pipe: Any, name: str = "") -> type[Any] | None:
    """Find the class of diffusers that a pipeline or its stand-in has, else the one called `name`; None for neither."""
    import diffusers

    found = (getattr(diffusers, known, None) for known in (type(pipe).__name__, name) if known.endswith("Pipeline"))
    return next((kind for kind in found if kind is not None), None)


def default_steps(kind: type[Any]) -> int | None:
    """Read how many steps pipelines of a class take by default; None where the class has no default."""
    parameter = call_parameters(kind).get(STEPS)
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def default_scale(kind: type[Any]) -> float | None:
    """Read the guidance scale that pipelines of a class have by default; None where the class has none."""
    parameter = call_parameters(kind).get(SCALE)
    return float(parameter.default) if parameter and isinstance(parameter.default, (int, float)) else None


def precision(name: str | None) -> dict[str, Any]:
    """Turn the name of a dtype into arguments for `from_pretrained`.

    Raises `ModelError` for a name other than `DTYPES`.
    """
    import torch

    if name is None:
        return {}
    if name not in DTYPES:
        raise ModelError(f"unknown dtype {name!r}; allowed: {', '.join(DTYPES)}")
    return {"torch_dtype": getattr(torch, name)}


def scheduler_for(pipe: Any, name: str) -> Any:
    """Make a scheduler with the settings of the pipeline's own; `name` may lack the suffix "Scheduler" or be short.

    Raises `ModelError` where the pipeline doesn't take it.
    """
    known = {kind.__name__: kind for kind in pipe.scheduler.compatibles}
    names = (name, f"{name}Scheduler", *SCHEDULERS.get(name, ()))
    kind = next((known[one] for one in names if one in known), None)
    if kind is None:
        allowed = ", ".join(sorted(known))
        raise ModelError(f"unknown scheduler {name!r}{nearest(name, known)}; {type(pipe).__name__} takes: {allowed}")
    return kind.from_config(pipe.scheduler.config)


def default_device() -> str:
    """Name the device that is used where none is given: cuda where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def move(pipe: Any, device: str | None) -> None:
    """Move a pipeline to `device`, by default to cuda where there is one.

    Raises `ModelError` where the machine lacks the device.
    """
    try:
        pipe.to(device or default_device())
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot use device {device!r}: {first_line(error)}; give cpu, or one that is here") from error


class _ComponentsFromConfig:
    """A stand-in for a pipeline that builds each component from its config when it is accessed."""

    def __init__(self, model: str, index: dict[str, Any], hub: dict[str, Any]) -> None:
        self._model = model
        self._index = index
        self._hub = hub

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along each side."""
        channels = self.vae.config.get("block_out_channels")
        if channels is None:
            raise AttributeError("vae_scale_factor")
        return int(2 ** (len(channels) - 1))

    def __getattr__(self, name: str) -> Any:
        import diffusers

        entry = vars(self)["_index"].get(name)
        if not isinstance(entry, (list, tuple)) or not entry or entry[0] is None:
            raise AttributeError(name)
        kind = getattr(diffusers, str(entry[-1]), None)
        # A scheduler's config has another file name than a model's.
        is_scheduler = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
        loader: Any = kind if is_scheduler else diffusers.AutoModel
        try:
            config = loader.load_config(self._model, subfolder=name, **self._hub)
        except _DAMAGED as error:
            raise _unreadable(self._model, error) from error
        return _on_meta(self._model, config)


def _on_meta(model: str, config: Any) -> nn.Module:
    import diffusers
    import torch

    name = str(config.get("_class_name", "")) if isinstance(config, dict) else ""
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type):
        raise ModelError(f"model {model!r}: diffusers has no class {name!r}; load it in Python")
    # Schedulers calculate their tables, for which they need values.
    device = "cpu" if issubclass(kind, diffusers.SchedulerMixin) else "meta"
    try:
        with torch.device(device):
            made: Any = kind
            denoiser: nn.Module = made.from_config(config)
    except _DAMAGED as error:
        raise _unreadable(model, error) from error
    return denoiser


def _unreadable(model: str, error: Exception) -> ModelError:
    reason = next(iter(str(error).strip().splitlines()), "")
    if not isinstance(error, (OSError, ValueError)):
        reason = f"{type(error).__name__}: {reason}"
    return unreadable(model, reason)
