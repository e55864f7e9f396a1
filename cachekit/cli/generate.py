"""`cachekit generate`: images from any diffusers pipeline with policies."""

from __future__ import annotations

import contextlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.output import say
from cachekit.errors import CachekitError, nearest
from cachekit.models import loading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL.Image import Image

_MODEL = f"Folder or hub id of a diffusers pipeline, or {loading.EMBEDDED}."
_PAIR = "KEY=VALUE"


class ArgumentError(CachekitError):
    """An argument of the command line that cannot be used."""


def generate(
    pipeline: Annotated[str, typer.Argument(help=_MODEL)],
    prompt: Annotated[str | None, typer.Argument(help="Prompt, where the pipeline takes one.")] = None,
    spec: Annotated[list[str] | None, typer.Option(help="Spec such as tgate:m=10; may be repeated.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps; default: the pipeline's own.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the pipeline's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    output: Annotated[Path, typer.Option(help="Image file; several images get numbered files.")] = Path("out.png"),
    scheduler: Annotated[str | None, typer.Option(help="Scheduler of diffusers, such as DDIMScheduler.")] = None,
    device: Annotated[str | None, typer.Option(help="Device; default: cuda where present, else cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"Precision: {', '.join(loading.DTYPES)}.")] = None,
    max_cache_bytes: Annotated[int | None, typer.Option(min=1, help="Limit of cached tensors in bytes.")] = None,
    cache_device: Annotated[str | None, typer.Option(help="Device that stores cached tensors, such as cpu.")] = None,
    load: Annotated[
        list[str] | None, typer.Option(metavar=_PAIR, help="Argument of from_pretrained; may be repeated.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar=_PAIR, help="Argument of the pipeline's call; may be repeated.")
    ] = None,
) -> None:
    """Generate images with any pipeline and policies, print the report, and write the images."""
    from cachekit.applying import apply
    from cachekit.interface.specs import parse_all
    from cachekit.registry.catalog import installed
    from cachekit.upstream.scales import SCALE

    # Refused here before the model is loaded; `apply` is given the specs, whose presets it compares with the pipeline.
    parse_all(spec or [], installed())
    given = {"prompt": prompt, "num_inference_steps": steps, SCALE: guidance}
    arguments = {**{name: value for name, value in given.items() if value is not None}, **_pairs(set_)}
    _check_output(output)
    pipe = loading.pipeline(pipeline, **loading.precision(dtype), **_pairs(load))
    _check_arguments(pipe, arguments)
    if scheduler:
        pipe.scheduler = loading.scheduler_for(pipe, scheduler)
    loading.move(pipe, device)
    limits: dict[str, Any] = {"max_cache_bytes": max_cache_bytes, "cache_device": cache_device}
    with apply(pipe, spec, **limits) if spec else contextlib.nullcontext() as attachment:
        pictures = _draw(pipe, seed, arguments)
        say(attachment.report() if attachment else "no specs: uncached")
    for path in _write(pictures, output):
        say(f"wrote {path}")


def _draw(pipe: Any, seed: int, arguments: dict[str, Any]) -> list[Image]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    try:
        inspect.signature(type(pipe).__call__).bind(pipe, **arguments)
        result = pipe(**{"generator": generator, **arguments})
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{type(pipe).__name__} refuses its arguments: {error}; change --set") from error
    return list(_pictures(result, type(pipe).__name__))


def _pictures(result: Any, name: str) -> Iterator[Image]:
    """Yield the images, or the frames of the videos, of a pipeline's result."""
    found = getattr(result, "images", getattr(result, "frames", None))
    if not isinstance(found, list):
        raise ArgumentError(f"{name} gave no images that can be written; call it from Python")
    for item in found:
        yield from item if isinstance(item, list) else [item]


def _check_output(output: Path) -> None:
    from PIL import Image

    known = Image.registered_extensions()
    if known.get(output.suffix.lower()) not in Image.SAVE:
        raise ArgumentError(f"cannot write {str(output)!r}: no image format is called {output.suffix!r}; use .png")


def _write(pictures: list[Image], output: Path) -> list[Path]:
    """Write one picture to `output`, several to numbered files beside it."""
    digits = len(str(len(pictures) - 1))
    numbered = [output.with_stem(f"{output.stem}-{index:0{digits}}") for index in range(len(pictures))]
    paths = [output] if len(pictures) == 1 else numbered
    output.parent.mkdir(parents=True, exist_ok=True)
    for picture, path in zip(pictures, paths):
        picture.save(path)
    return paths


def _check_arguments(pipe: Any, arguments: dict[str, Any]) -> None:
    """Refuse arguments that the call lacks; where it takes **kwargs, only names that look mistyped."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in arguments:
        meant = nearest(name, parameters)
        if name not in parameters and (meant or not takes_any):
            raise ArgumentError(f"{type(pipe).__name__} takes no argument {name!r}{meant}")


def _pairs(texts: list[str] | None) -> dict[str, Any]:
    """Parse KEY=VALUE texts; a value is JSON where it parses as such, else text."""
    pairs: dict[str, Any] = {}
    for text in texts or []:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ArgumentError(f"{text!r} is not {_PAIR}")
        try:
            pairs[key] = json.loads(value)
        except (ValueError, RecursionError):
            pairs[key] = value
    return pairs
