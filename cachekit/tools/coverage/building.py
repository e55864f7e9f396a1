"""Build a small pipeline of a class, and the arguments of a short call."""

from __future__ import annotations

import inspect
import warnings
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import nn

from cachekit.tools.coverage.components import NotBuiltError, make, make_one, seed_weights
from cachekit.tools.coverage.facts import Facts, facts_of
from cachekit.upstream.calling import call_parameters
from cachekit.upstream.pipelines import DENOISERS, STAGES, hide_progress

#: Components that are left out unless facts ask for them.
_LEFT_OUT = {"safety_checker", "watermarker"}
#: Components whose weights are initialised at random: the denoisers, and what adds to their features.
_SEEDED = (*DENOISERS, *STAGES, "text_unet", "controlnet", "adapter", "motion_adapter")
#: Schedulers where the annotation leaves the choice open.
_ANY_SCHEDULER = "KarrasDiffusionSchedulers"


def pipeline_names() -> list[str]:
    """List the pipeline classes of diffusers without loading them; modular pipelines are left out."""
    import diffusers

    other = ("Output", "Blocks", "QuantizationConfig", "ModularPipeline")
    names = (name for name in dir(diffusers) if "Pipeline" in name and not name.startswith(("AutoPipeline", "_")))
    return sorted(name for name in names if not name.endswith(other) and name != "DiffusionPipeline")


def pipeline_class(name: str) -> Any:
    """Load a pipeline class.

    Raises `NotBuiltError` where it needs packages that aren't installed or isn't a PyTorch pipeline.
    """
    import diffusers

    cls = getattr(diffusers, name)
    if not _is_pipeline(cls):
        missing = _absent(getattr(cls, "_backends", []))
        raise NotBuiltError(f"needs {' and '.join(missing)}" if missing else "is no pipeline of torch")
    return cls


def build(name: str) -> Any:
    """Build a small pipeline of the class `name`, with seeded weights.

    Raises `NotBuiltError` with the reason where that isn't possible.
    """
    facts = facts_of(name)
    if facts.skip:
        raise NotBuiltError(facts.skip)
    if facts.needs and find_spec(facts.needs) is None:
        raise NotBuiltError(f"needs {facts.needs}")
    cls = pipeline_class(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = cls(**_components(cls, facts))
    hide_progress(pipe)
    for key in _SEEDED:
        module = getattr(pipe, key, None)
        if isinstance(module, nn.Module):
            seed_weights(module)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for method, given in facts.before.items():
            getattr(pipe, method)(**_values(given))
    return pipe


def arguments(pipe: Any, name: str) -> dict[str, Any]:
    """Make the arguments of a short call: those of the facts that the pipeline takes."""
    taken = call_parameters(pipe)
    given = _values({key: value for key, value in facts_of(name).call.items() if key in taken})
    if "generator" in taken and "generator" not in given:
        given["generator"] = torch.Generator().manual_seed(0)
    return given


def _is_pipeline(cls: Any) -> bool:
    from diffusers import DiffusionPipeline

    return inspect.isclass(cls) and issubclass(cls, DiffusionPipeline)


def _absent(backends: list[str]) -> list[str]:
    from diffusers.utils import import_utils

    checks = {name: check for name, (check, _) in import_utils.BACKENDS_MAPPING.items()}
    return [name for name in backends if name not in checks or not checks[name]()]


def _components(cls: Any, facts: Facts) -> dict[str, Any]:
    """Build the components that the facts describe, and those that the constructor requires."""
    annotated = cls._get_signature_types()
    components: dict[str, Any] = {}
    for key, parameter in inspect.signature(cls.__init__).parameters.items():
        if key == "self" or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        if key in facts.components:
            components[key] = _described(facts.components[key], annotated.get(key, ()))
        elif parameter.default is parameter.empty:
            components[key] = None if key in _LEFT_OUT else _annotated(key, annotated.get(key, ()))
        elif key == "requires_safety_checker":
            components[key] = False
    return components


def _described(given: Any, types: Any) -> Any:
    if not isinstance(given, dict):
        return given
    classes = [one for one in types if inspect.isclass(one)]
    return make(given, classes[0] if classes else None)


def _annotated(key: str, types: Any) -> Any:
    for one in types:
        if getattr(one, "__name__", "") == _ANY_SCHEDULER:
            return make({"use": "DDIMScheduler"})
        if inspect.isclass(one) and one is not inspect.Parameter.empty and one.__module__ != "builtins":
            return make_one(one, one.__name__, {})
    raise NotBuiltError(f"{key} has no annotation that says what it is")


def _values(given: dict[str, Any]) -> dict[str, Any]:
    return {key: _value(value) for key, value in given.items()}


def _value(value: Any) -> Any:
    """Make an argument; facts describe images, videos and tensors as {"$kind": size}."""
    if isinstance(value, list):
        return [_value(one) for one in value]
    if not isinstance(value, dict) or not any(key.startswith("$") for key in value):
        return value
    ((kind, size),) = value.items()
    return _MAKERS[kind](size)


def _noise(shape: list[int]) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape)).random(shape)


def _image(size: list[int]) -> Any:
    from PIL import Image

    return Image.fromarray((_noise([*size[::-1], 3]) * 255).astype("uint8"))


def _mask(size: list[int]) -> Any:
    from PIL import Image

    pixels = np.zeros(size[::-1], "uint8")
    pixels[: size[1] // 2] = 255
    return Image.fromarray(pixels)


def _video(size: list[int]) -> list[Any]:
    frames, *rest = size
    return [_image(rest) for _ in range(frames)]


def _masks(size: list[int]) -> list[Any]:
    frames, *rest = size
    return [_mask(rest) for _ in range(frames)]


def _tensor(shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(_noise(shape)).float()


def _other(shape: list[int]) -> torch.Tensor:
    return _tensor(shape).flip(-1)


def _tokens(shape: list[int]) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.long)


_MAKERS: dict[str, Any] = {
    "$image": _image,
    "$mask": _mask,
    "$video": _video,
    "$masks": _masks,
    "$tensor": _tensor,
    "$other": _other,
    "$kept": _tokens,
    "$true": lambda shape: torch.ones(shape, dtype=torch.bool),
    "$ones": torch.ones,
    "$integers": torch.tensor,
    "$tuple": tuple,
}
