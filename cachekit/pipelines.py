"""Know diffusers' pipelines from outside: where the denoisers are, and where a run begins and ends."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from .compiled import without_compiler
from .errors import AdapterError

if TYPE_CHECKING:
    from .clock import Clock

#: Where pipelines hold what denoises: together in one loop, or one loop after the other.
_DENOISERS = ("unet", "transformer", "transformer_2", "image_unet", "unconditional_transformer")
_STAGES = ("prior", "decoder", "prior_prior")
#: Where modular pipelines hold what prepares the calls of a step, and combines what comes of them.
_GUIDERS = ("guider", "guider_2")
#: Guiders that do not count the calls that they have prepared.
_UNCOUNTED = ("SmoothedEnergyGuidance",)

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


def companions_of(pipe: Any) -> Iterator[nn.Module]:
    """Yield the modules of a pipeline whose residuals its denoiser adds: each ControlNet of one or several."""
    found = getattr(pipe, "controlnet", None)
    if isinstance(found, nn.Module):
        yield from getattr(found, "nets", [found])


def name_by_guider(pipe: Any, clock: Clock) -> str | None:
    """Return what a modular pipeline's guider calls the prediction that the present call is for.

    Without a guider, or outside of its calls, it is None. A name other than the first two has the place of the call
    after it: guiders give one name to calls with other inputs.
    """
    guiders = [(guider, guider.get_state()) for guider in _guiders(pipe)]
    if len(guiders) > 1:
        guiders = [(guider, state) for guider, state in guiders if state["step"] == clock.step]
    if not guiders:
        return None
    guider, state = guiders[0]
    names = [getattr(call, guider._identifier_key) for call in guider.prepare_inputs({})]
    place = clock.call + 1 if type(guider).__name__ in _UNCOUNTED else state["count_prepared"]
    if not 0 < place <= len(names):
        return None
    name: str = names[place - 1]
    return name if name in ("pred_cond", "pred_uncond") else f"{name} {place}"


def perturbs_attention(pipe: Any, denoiser: nn.Module) -> bool:
    """Tell whether attention is perturbed for a branch: as the pipeline says, or the processors in a bare loop."""
    told = getattr(pipe, "do_perturbed_attention_guidance", None)
    if told is not None:
        return bool(told)
    processors = getattr(denoiser, "attn_processors", {}).values()
    return any(type(processor).__name__.startswith("PAG") for processor in processors)


def has_momentum(pipe: Any) -> bool:
    """Tell whether guidance adds up what the branches differed by in earlier steps."""
    return any(getattr(guider, "momentum_buffer", None) is not None for guider in _guiders(pipe))


def _guiders(pipe: Any) -> list[Any]:
    found = (getattr(pipe, name, None) for name in _GUIDERS)
    return [guider for guider in found if hasattr(guider, "prepare_inputs")]


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
        pipe.__class__ = _subclass(type(pipe))


def untrack(pipe: Any) -> None:
    """Put the pipeline's own class back."""
    base = vars(type(pipe)).get(_BASE)
    if base is not None:
        pipe.__class__ = base


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


def _subclass(base: type[Any]) -> type[Any]:
    return _SUBCLASSES.get(base) or _SUBCLASSES.setdefault(base, _tracked(base))


def _remake(base: type[Any]) -> Any:
    return object.__new__(_subclass(base))


def _tracked(base: Any) -> type[Any]:
    @functools.wraps(base.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        from .engine import attachments_of

        with contextlib.ExitStack() as runs:
            for attachment in attachments_of(self):
                runs.enter_context(attachment.driver.run_of(self, args, kwargs))
            return base.__call__(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        """Name the class by what it is made of: it cannot be imported."""
        return (_remake, (base,), *base.__reduce_ex__(self, protocol)[2:])

    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    own: dict[str, Any] = {"__call__": call, _BASE: base, **names}
    if (base.__reduce__, base.__reduce_ex__) == (object.__reduce__, object.__reduce_ex__):  # else it says what it is
        own["__reduce_ex__"] = reduce
    return type(base.__name__, (base,), own)
