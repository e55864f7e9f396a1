"""Inspect diffusers pipelines: denoisers, ControlNets and the arguments of their calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from cachekit.errors import AdapterError
from cachekit.upstream.compiling import without_compiler

#: Where pipelines hold what denoises: together in one loop, or one loop after the other.
_DENOISERS = ("unet", "transformer", "transformer_2", "image_unet", "unconditional_transformer")


_STAGES = ("prior", "decoder", "prior_prior")


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


def controlnets_of(pipe: Any) -> Iterator[nn.Module]:
    """Yield the modules of a pipeline whose residuals its denoiser adds: each ControlNet of one or several."""
    found = getattr(pipe, "controlnet", None)
    if isinstance(found, nn.Module):
        yield from getattr(found, "nets", [found])


def perturbs_attention(pipe: Any, denoiser: nn.Module) -> bool:
    """Tell whether attention is perturbed for a branch: as the pipeline says, or the processors in a bare loop."""
    told = getattr(pipe, "do_perturbed_attention_guidance", None)
    if told is not None:
        return bool(told)
    processors = getattr(denoiser, "attn_processors", {}).values()
    return any(type(processor).__name__.startswith("PAG") for processor in processors)


def with_inner(pipe: Any) -> Iterator[Any]:
    """Yield a pipeline and the pipelines that it calls: a combined one's prior and decoder."""
    yield pipe
    for value in list(vars(pipe).values()):
        if hasattr(value, "register_modules") and _denoisers(value):
            yield value


def call_arguments(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a pipeline call's arguments by name, defaults included."""
    signature = inspect.signature(type(pipe).__call__)
    try:
        bound = signature.bind_partial(pipe, *args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    arguments = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name)
    return arguments


def plain_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that are numbers or texts, or lists of texts: what a report may hold on to."""
    plain = (str, int, float, bool)
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, plain) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    }
