"""`cachekit generate`: images from any diffusers pipeline with policies."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.batch import draw
from cachekit.cli.models import RUNNABLE_MODEL, Dtype, complete_runnable, runnable_name
from cachekit.cli.output import JsonFile, check_writable, choice, json_results, say, warn
from cachekit.cli.settings import command
from cachekit.errors import CachekitError
from cachekit.tools.workers import EXECUTORS

if TYPE_CHECKING:
    from PIL.Image import Image

    from cachekit.tools.batch.drawing import Job
    from cachekit.tools.batch.rows import Defaults

_PAIR = "KEY=VALUE"
_PROMPTS = (
    "File with a row for each image: a prompt on each line, or JSON objects with prompt, seed, steps, size, guidance"
    " and spec of their own; - is stdin. Images that exist are not drawn again."
)
_OUTPUT = "Image file (several images get numbered files), or with --prompts a folder; default: out.png, or images."
_WORKERS = "With --prompts, processes or actors; default: one for each GPU, or two without a GPU."
#: Files whose names are given as a prompt by mistake.
_TEXTS = (".txt", ".json", ".jsonl", ".csv", ".ndjson")


class ArgumentError(CachekitError):
    """An argument of the command line that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Options of `cachekit generate`."""

    pipeline: Annotated[
        str, typer.Argument(help=RUNNABLE_MODEL, parser=runnable_name, autocompletion=complete_runnable)
    ]
    prompt: Annotated[str | None, typer.Argument(help="Prompt, where the pipeline takes one.")] = None
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help=_PROMPTS)] = None
    spec: Annotated[list[str], typer.Option(help="Spec such as tgate:m=10; may be repeated.")] = field(
        default_factory=list
    )
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps; default: the pipeline's own.")] = None
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Pixels; default: the pipeline's own.")] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the pipeline's own.")] = None
    seed: Annotated[int, typer.Option(help="Seed of the noise; with --prompts, of the first row's.")] = 0
    output: Annotated[Path | None, typer.Option(help=_OUTPUT)] = None
    executor: Annotated[
        str, typer.Option(help="With --prompts, where images are drawn.", **choice(EXECUTORS, "executor"))
    ] = "serial"
    workers: Annotated[int | None, typer.Option(min=1, help=_WORKERS)] = None
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch in each worker.")] = None
    scheduler: Annotated[str | None, typer.Option(help="Scheduler of diffusers, such as DDIMScheduler.")] = None
    device: Annotated[str | None, typer.Option(help="Device; default: cuda where present, else cpu.")] = None
    dtype: Dtype = None
    max_cache_bytes: Annotated[int | None, typer.Option(min=1, help="Limit of cached tensors in bytes.")] = None
    cache_device: Annotated[str | None, typer.Option(help="Device that stores cached tensors, such as cpu.")] = None
    load: Annotated[list[str], typer.Option(metavar=_PAIR, help="Argument of from_pretrained; may be repeated.")] = (
        field(default_factory=list)
    )
    set_: Annotated[
        list[str], typer.Option("--set", metavar=_PAIR, help="Argument of the pipeline's call; may be repeated.")
    ] = field(default_factory=list)
    json: JsonFile = None

    def job(self) -> Job:
        """Make what a worker draws with."""
        from cachekit.tools.batch.drawing import Job
        from cachekit.tools.workers import threads_of

        executor = self.executor if self.prompts is not None else "serial"
        return Job(
            model=self.pipeline,
            scheduler=self.scheduler,
            device=self.device,
            dtype=self.dtype,
            max_cache_bytes=self.max_cache_bytes,
            cache_device=self.cache_device,
            load=json.dumps(_pairs(self.load)),
            arguments=json.dumps(_pairs(self.set_)),
            threads=self.threads or threads_of(executor, self.workers),
        )

    def defaults(self) -> Defaults:
        """Make what a row is drawn with unless it says otherwise."""
        from cachekit.interface.specs import joined
        from cachekit.tools.batch.rows import Defaults

        specs = tuple(one for text in self.spec for one in joined(text))
        return Defaults(self.seed, self.steps, _size(self.size), self.guidance, specs)


@command(GenerateSettings)
def generate(settings: GenerateSettings) -> None:
    """Generate an image with any pipeline and policies and print the report, or an image for each row of a file."""
    from cachekit.models.hub import hub_arguments

    # Before torch is imported.
    hub_arguments(settings.pipeline, _pairs(settings.load).get("cache_dir"))
    job, defaults, prompt, prompts = settings.job(), settings.defaults(), settings.prompt, settings.prompts
    if prompts is None:
        _one(job, defaults, prompt, settings.output or Path("out.png"), settings.json)
        return
    if prompt is not None:
        raise ArgumentError(f"a prompt {prompt!r} and --prompts {prompts!r} exclude each other; leave one of them out")
    output = settings.output or Path("images")
    draw(prompts, job, defaults, output, settings.executor, settings.workers, settings.json)


def _size(text: str | None) -> tuple[int, int] | None:
    from cachekit.tools.batch.rows import size_of

    try:
        return size_of(text) if text is not None else None
    except ValueError as error:
        raise ArgumentError(f"--size {text!r}: {error}") from None


def _one(job: Job, defaults: Defaults, prompt: str | None, output: Path, file: Path | None) -> None:
    """Generate the image, or the images, of one call."""
    from cachekit.applying import apply
    from cachekit.interface.specs import parse_all
    from cachekit.registry.catalog import installed
    from cachekit.registry.notices import silent_log
    from cachekit.tools.batch.drawing import call, check_arguments, unread_lines
    from cachekit.upstream.calling import SCALE, STEPS

    # Refused here before the model is loaded; `apply` is given the specs, whose presets it compares with the pipeline.
    parse_all(defaults.specs, installed())
    width, height = defaults.size or (None, None)
    given = {"prompt": prompt, STEPS: defaults.steps, SCALE: defaults.guidance}
    given |= {"width": width, "height": height}
    own = json.loads(job.arguments)
    arguments = {**{name: value for name, value in given.items() if value is not None}, **own}
    _check_prompt(prompt)
    _check_output(output)
    # The report has the warnings that the log would print once more.
    printed = silent_log() if file != Path("-") else contextlib.nullcontext()
    with json_results(file) as give, printed:
        pipe = job.pipeline()
        check_arguments(pipe, arguments)
        for line in unread_lines(pipe, own):
            warn(line)
        limits: dict[str, Any] = {"max_cache_bytes": job.max_cache_bytes, "cache_device": job.cache_device}
        with apply(pipe, defaults.specs, **limits) if defaults.specs else contextlib.nullcontext() as attachment:
            pictures = call(pipe, defaults.seed, arguments)
            report = attachment.report() if attachment else None
            say(report or "no specs: uncached")
        paths = _write(pictures, output)
        for path in paths:
            say(f"wrote {path}")
        give({"images": list(map(str, paths)), "specs": list(defaults.specs), "report": report and report.to_dict()})


def _check_prompt(prompt: str | None) -> None:
    """Refuse the name of a file as a prompt."""
    if prompt and Path(prompt).suffix.lower() in _TEXTS and len(prompt) < 256 and Path(prompt).is_file():
        raise ArgumentError(f"prompt {prompt!r} is the name of a file; to draw its rows, give --prompts {prompt}")


def _check_output(output: Path) -> None:
    from PIL import Image

    known = Image.registered_extensions()
    if known.get(output.suffix.lower()) not in Image.SAVE:
        raise ArgumentError(f"cannot write {str(output)!r}: no image format is called {output.suffix!r}; use .png")
    there = next(folder for folder in output.absolute().parents if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ArgumentError(f"cannot write {str(output)!r}: {str(there)!r} can't be written to; give another --output")
    if output.exists():
        check_writable(output)


def _write(pictures: list[Image], output: Path) -> list[Path]:
    """Write one picture to `output`, several to numbered files beside it."""
    digits = len(str(len(pictures) - 1))
    numbered = [output.with_stem(f"{output.stem}-{index:0{digits}}") for index in range(len(pictures))]
    paths = [output] if len(pictures) == 1 else numbered
    output.parent.mkdir(parents=True, exist_ok=True)
    for picture, path in zip(pictures, paths):
        picture.save(path)
    return paths


def _pairs(texts: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE texts; a value is JSON where it parses as such, else text."""
    pairs: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals):
            raise ArgumentError(f"{text!r} is not {_PAIR}")
        try:
            pairs[key] = json.loads(value)
        except (ValueError, RecursionError):
            pairs[key] = value
    return pairs
