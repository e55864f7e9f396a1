"""Know diffusers' pipelines from outside: where the denoisers are, and where a run begins and ends."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from .compiled import without_compiler
from .errors import AdapterError

#: Where pipelines hold what denoises: together in one loop, or one loop after the other.
_DENOISERS = ("unet", "transformer", "transformer_2")
_STAGES = ("prior", "decoder", "prior_prior")

_BASE = "_cachekit_base"
_SUBCLASSES: dict[type[Any], type[Any]] = {}


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by name, or the module itself; raise `AdapterError` where there is none.

    A prior and a decoder are denoisers where nothing else is.
    """
    if isinstance(pipe, nn.Module):
        return {"": without_compiler(pipe)}
    found = _denoisers(pipe)
    if not found:
        looked_for = ", ".join((*_DENOISERS, *_STAGES))
        raise AdapterError(f"{type(pipe).__name__} has no denoiser: looked for {looked_for}; give a diffusers pipeline")
    return found


def denoiser_of(pipe: Any) -> nn.Module:
    """Return the first denoiser of a pipeline, or the module itself; raise `AdapterError` where there is none."""
    return next(iter(denoisers_of(pipe).values()))


def _denoisers(pipe: Any) -> dict[str, nn.Module]:
    return _modules(pipe, _DENOISERS) or _modules(pipe, _STAGES)


def _modules(pipe: Any, names: tuple[str, ...]) -> dict[str, nn.Module]:
    present = {name: getattr(pipe, name, None) for name in names}
    return {name: without_compiler(module) for name, module in present.items() if isinstance(module, nn.Module)}


def with_inner(pipe: Any) -> Iterator[Any]:
    """Yield a pipeline and the pipelines that it calls: a combined one's prior and decoder."""
    yield pipe
    for value in list(vars(pipe).values()):
        if hasattr(value, "register_modules") and _denoisers(value):
            yield value


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
        from .engine import attachments_of

        with contextlib.ExitStack() as runs:
            for attachment in attachments_of(self):
                runs.enter_context(attachment.driver.run_of(self, args, kwargs))
            return base.__call__(self, *args, **kwargs)

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    return type(base.__name__, (base,), {"__call__": call, _BASE: base, **names})
