"""Know diffusers' pipelines from outside: where the denoiser is, and where a run begins and ends."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import nn

from .errors import AdapterError

_DENOISERS = ("unet", "transformer")
_BASE = "_cachekit_base"
_SUBCLASSES: dict[type[Any], type[Any]] = {}


def denoiser_of(pipe: Any) -> nn.Module:
    """Return the denoiser of a pipeline, or the module itself; raise `AdapterError` where there is none."""
    if isinstance(pipe, nn.Module):
        return pipe
    found = [getattr(pipe, name, None) for name in _DENOISERS]
    for module in found:
        if isinstance(module, nn.Module):
            return module
    raise AdapterError(
        f"{type(pipe).__name__} has no denoiser: looked for {' and '.join(_DENOISERS)}; give a diffusers pipeline"
    )


def track(pipe: Any) -> None:
    """Give the pipeline instance a subclass of its own class whose call bounds the run.

    The subclass has the class's own name, so `isinstance`, `from_pipe`, `save_pretrained` and deep copies see
    the class they know; the class itself is never changed.
    """
    if _BASE not in vars(type(pipe)):
        base = type(pipe)
        pipe.__class__ = _SUBCLASSES.setdefault(base, _tracked(base))


def untrack(pipe: Any) -> None:
    """Put the pipeline's own class back."""
    base = vars(type(pipe)).get(_BASE)
    if base is not None:
        pipe.__class__ = base


def call_arguments(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline call's arguments by name, defaults included."""
    try:
        bound = inspect.signature(type(pipe).__call__).bind_partial(pipe, *args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


def plain_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that are numbers or texts, or lists of texts: what a report may hold on to."""
    plain = (str, int, float, bool)
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, plain) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    }


def _tracked(base: type[Any]) -> type[Any]:
    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .engine import attachment_of

        attachment = attachment_of(denoiser_of(self))
        if attachment is None:
            return base.__call__(self, *args, **kwargs)
        with attachment.run_of(self, args, kwargs):
            return base.__call__(self, *args, **kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {"__call__": call, _BASE: base, **names})
