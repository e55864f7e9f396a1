"""Inspect diffusers pipelines: their denoisers, their ControlNets, and the arguments of their calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from cachekit.errors import AdapterError
from cachekit.upstream.compiling import without_compiler

#: The attribute of pipelines with the settings of their progress bars.
_PROGRESS = "_progress_bar_config"

#: Attributes in which pipelines hold denoisers: together in one loop, or one loop after the other.
DENOISERS = ("unet", "transformer", "transformer_2", "image_unet", "unconditional_transformer")
#: Attributes of pipelines in stages, each with a loop of its own; looked at where there is none of the above.
STAGES = ("prior", "decoder", "prior_prior")


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """Find the denoisers of a pipeline, by the names of its attributes; a bare module is one with an empty name.

    Where torch has compiled a denoiser, it is the module that was compiled. Raises `AdapterError` where there is none.
    """
    if isinstance(pipe, nn.Module):
        return {"": without_compiler(pipe)}
    found = _denoisers(pipe)
    if not found:
        looked_for = ", ".join((*DENOISERS, *STAGES))
        raise AdapterError(f"{type(pipe).__name__} has no denoiser: looked for {looked_for}; give a diffusers pipeline")
    return found


def denoiser_of(pipe: Any) -> nn.Module:
    """Find the first denoiser of a pipeline; otherwise as `denoisers_of`."""
    return next(iter(denoisers_of(pipe).values()))


def with_inner(pipe: Any) -> Iterator[Any]:
    """Yield a pipeline and the pipelines that it calls, such as the prior and the decoder of a combined one."""
    yield pipe
    for value in list(vars(pipe).values()):
        if hasattr(value, "register_modules") and _denoisers(value):
            yield value


def pixels_per_latent(pipe: Any, default: int) -> int:
    """Read how many pixels a latent stands for along each side, where the pipeline shows it."""
    return int(getattr(pipe, "vae_scale_factor", default))


def controlnets_of(pipe: Any) -> Iterator[nn.Module]:
    """Yield each ControlNet of a pipeline, whose residuals its denoiser adds; a multi-ControlNet is unpacked."""
    found = getattr(pipe, "controlnet", None)
    if isinstance(found, nn.Module):
        yield from getattr(found, "nets", [found])


def hide_progress(pipe: Any) -> None:
    """Turn off the progress bar of a pipeline, where it has one."""
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)


@contextmanager
def without_progress(pipe: Any) -> Iterator[None]:
    """Turn off the progress bar of a pipeline within the block."""
    before = vars(pipe).get(_PROGRESS)
    hide_progress(pipe)
    try:
        yield
    finally:
        vars(pipe).pop(_PROGRESS, None)
        if before is not None:
            vars(pipe)[_PROGRESS] = before


def offloads(pipe: Any) -> bool:
    """Whether a pipeline moves its models to a device for their calls alone."""
    return bool(getattr(pipe, "_all_hooks", None))


def call_arguments(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name the arguments of a pipeline's call, defaults included; none for a call that the pipeline will refuse."""
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


def names_branches(kind: type[Any]) -> bool:
    """Whether pipelines of a class call the denoiser once for each guidance branch, under the branch's name."""
    return 'cache_context("uncond")' in inspect.getsource(inspect.unwrap(kind.__call__))


def most_tokens(pipe: Any) -> int | None:
    """How many tokens of a text a pipeline reads by default; None for as many as its tokenizers give."""
    found: int | None = call_arguments(pipe, (), {}).get("max_sequence_length")
    return found


def plain_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments that a report may hold on to: numbers, texts and lists of texts."""
    plain = (str, int, float, bool)
    return {
        name: value
        for name, value in arguments.items()
        if isinstance(value, plain) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    }


def _denoisers(pipe: Any) -> dict[str, nn.Module]:
    return _modules(pipe, DENOISERS) or _modules(pipe, STAGES)


def _modules(pipe: Any, names: tuple[str, ...]) -> dict[str, nn.Module]:
    present = {name: getattr(pipe, name, None) for name in names}
    return {name: without_compiler(module) for name, module in present.items() if isinstance(module, nn.Module)}
