"""`cachekit tune`: the specs that reach a target on one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.models import Dtype, RunnableModel
from cachekit.cli.output import JsonFile, check_writable, choice, json_results, print_table, progress_bar, say
from cachekit.cli.settings import command
from cachekit.errors import CachekitError
from cachekit.tools.workers import EXECUTORS

if TYPE_CHECKING:
    from cachekit.interface.presets import Figures, PlainSteps
    from cachekit.tools.tuning.targets import Targets
    from cachekit.tools.tuning.tune import Tuned

_CAPTIONS = "File with one caption per line, half of them for the verdict, or a number of held-out captions."
_MATCH = "Change of the share of images that show their caption, such as -1%."


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """Options of `cachekit tune`."""

    model: RunnableModel
    at_least: Annotated[str | None, typer.Option(help="Similarity to the uncached image, such as 35dB.")] = None
    caption_match: Annotated[str | None, typer.Option(help=_MATCH)] = None
    at_most: Annotated[str | None, typer.Option(help="Wall time of an image, such as 2s.")] = None
    speedup: Annotated[str | None, typer.Option(help="Ratio of wall times, such as 3.")] = None
    captions: Annotated[str, typer.Option(help=_CAPTIONS)] = "16"
    fresh: Annotated[int | None, typer.Option(min=1, help="Captions of the verdict: the last of the file.")] = None
    policy: Annotated[list[str], typer.Option(help="Policy to try; may be repeated. Default: all that fit.")] = field(
        default_factory=list
    )
    trials: Annotated[int, typer.Option(min=1, help="Candidates measured in the whole study.")] = 40
    seconds: Annotated[float | None, typer.Option(min=0, help="End this process's search after these seconds.")] = None
    steps: Annotated[int, typer.Option(min=2, help="Steps of the uncached pipeline.")] = 25
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the pipeline's own.")] = None
    scheduler: Annotated[str | None, typer.Option(help="Scheduler of diffusers; default: the model's own.")] = None
    seed: Annotated[int, typer.Option(help="Seed of the noise and the search.")] = 0
    journal: Annotated[Path | None, typer.Option(help="File of the study, resumed and shared by processes.")] = None
    output: Annotated[Path, typer.Option(help="File of the preset; a picture is put beside it.")] = Path("preset.json")
    executor: Annotated[str, typer.Option(help="Where candidates are measured.", **choice(EXECUTORS, "executor"))] = (
        "serial"
    )
    workers: Annotated[int | None, typer.Option(min=1, help="Processes or actors.")] = None
    device: Annotated[str | None, typer.Option(help="Device; default: cuda where present, else cpu.")] = None
    dtype: Dtype = None
    json: JsonFile = None


@command(TuneSettings)
def tune(settings: TuneSettings) -> None:
    """Find the specs that reach a target on a model, and write them to a preset with their evidence.

    All targets given must hold. The search measures policies, their numbers and parts, numbers of steps, and plain
    steps in one study; the verdict is on captions that it never used. Exit code 1 where nothing reaches the target.
    """
    from cachekit.tools.tuning.targets import LEAST, Targets
    from cachekit.tools.tuning.tune import tune as search

    asked = Targets.parse(settings.at_least, settings.caption_match, settings.at_most, settings.speedup)
    check_writable(settings.output)
    if settings.output == _picture(settings.output):
        raise CachekitError(f"--output {str(settings.output)!r} is the name of the picture beside it; end it in .json")
    check_writable(_picture(settings.output))
    with json_results(settings.json) as give:
        with progress_bar(f"tuning {settings.model}") as show:
            tuned = search(
                settings.model,
                _captions(settings.captions),
                fresh=settings.fresh,
                at_least=asked.at_least,
                caption_match=asked.caption_match,
                at_most=asked.at_most,
                speedup=asked.speedup,
                policies=settings.policy,
                trials=settings.trials,
                seconds=settings.seconds,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                scheduler=settings.scheduler,
                seed=settings.seed,
                journal=settings.journal,
                output=settings.output,
                executor=settings.executor,
                workers=_workers(settings),
                device=settings.device,
                dtype=settings.dtype,
                progress=lambda done, total, line: show(done, total, line and f"not measured: {line}"),
            )
        print_report(tuned, settings.output)
        give(_data(tuned))
        if tuned.verdict.nearest:
            reason = f"no candidate that saves {LEAST}x or more reaches the target"
            typer.echo(f"error: {reason}: {tuned.verdict.nearest}", err=True)
            raise typer.Exit(1)


def _data(tuned: Tuned) -> dict[str, Any]:
    """Write what a tuning has found as plain data."""
    return {
        "front": [{**asdict(one.candidate), **one.figures.model_dump(mode="json")} for one in tuned.front],
        "verdict": [{**asdict(one.candidate), **one.figures.model_dump(mode="json")} for one in tuned.verdict.judged],
        "preset": tuned.preset.model_dump(mode="json") if tuned.preset else None,
        "rival": tuned.verdict.rival.model_dump(mode="json") if tuned.verdict.rival else None,
        "nearest": tuned.verdict.nearest,
        "refused": tuned.refused,
    }


def _workers(settings: TuneSettings) -> int:
    from cachekit.tools.workers import default_workers

    return settings.workers or default_workers(settings.executor)


def _captions(source: str) -> int | list[str]:
    """Read a number, or the lines of a file: empty ones too, which are refused with their numbers."""
    if source.isdecimal():
        return int(source)
    if source.lower().endswith(".json"):
        from cachekit.tools.bench.captions import read_captions

        return list(read_captions(source).texts)
    try:
        text = Path(source).read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise CachekitError(f"cannot read captions {source!r}: give a file or a number above 0") from None
    # Other line boundaries of Unicode may stand within a caption.
    return text.removesuffix("\n").split("\n")


# -- what is printed --------------------------------------------------------------------------------------


def print_report(tuned: Tuned, output: Path) -> None:
    """Print the tables of a tuning and what was written, and draw its picture."""
    from cachekit.tools.tuning.picture import pareto_picture

    rows = [
        [f"{number}", one.candidate.label, str(one.candidate.steps), *_texts(one.figures)]
        for number, one in enumerate(tuned.front, 1)
    ]
    print_table(["", "candidate", "steps", *_HEADINGS], rows, "The search: what no other candidate beats.")
    picture = _picture(output)
    pareto_picture(tuned.measured, tuned.front, tuned.targets).save(picture)
    say(f"wrote {picture}")
    _print_verdict(tuned)
    if tuned.refused:
        say(f"{len(tuned.refused)} candidates were refused or failed, such as {tuned.refused[0]}")
    best, rival = tuned.verdict.best, tuned.verdict.rival
    if rival:
        say(f"plain steps are the better choice: {_plain_label(rival)} ({_line(rival.figures, tuned.targets)})")
    if best and tuned.preset:
        say(f"preset:{output}, {best.candidate.steps} steps: {_line(best.figures, tuned.targets)}")
        say(f"wrote {output}, which stands for {best.candidate.label}")


def _picture(output: Path) -> Path:
    return output.with_suffix(".png")


def _print_verdict(tuned: Tuned) -> None:
    rows = []
    for one in tuned.verdict.judged:
        rows.append([one.candidate.label, str(one.candidate.steps), *_texts(one.figures)])
        if one.plain:
            rows.append([f"  beside it: {_plain_label(one.plain)}", str(one.plain.steps), *_texts(one.plain.figures)])
    if rows:
        print_table(["candidate", "steps", *_HEADINGS], rows, "The verdict: captions that the search never used.")


def _plain_label(plain: PlainSteps) -> str:
    from cachekit.tools.tuning.candidates import Candidate

    return Candidate((), plain.steps, plain.spacing).label


_HEADINGS = ("MAC reduction", "speedup", "s/image", "PSNR", "SSIM", "caption match", "images")


def _texts(figures: Figures) -> Sequence[str]:
    """Texts of a row, as in the tables of the bench."""
    from cachekit.tools.bench.figures import FIGURES
    from cachekit.tools.tuning.targets import similarity_of

    values = {name: getattr(figures, name) for name in ("mac_reduction", "speedup", "seconds", "ssim", "caption_match")}
    values["psnr"] = similarity_of(figures) if figures.ssim is not None else None
    names = ("mac_reduction", "speedup", "seconds", "psnr", "ssim", "caption_match")
    texts = ["-" if values[name] is None else FIGURES[name].format(values[name]) for name in names]
    if figures.caption_match is not None and figures.uncached_caption_match is not None:
        texts[-1] += f" (uncached {figures.uncached_caption_match:.0%})"
    return [*texts, str(figures.images)]


def _line(figures: Figures, targets: Targets) -> str:
    values = [(target, target.value(figures)) for target in targets.listed]
    shown = [target.shown.format(value) if math.isfinite(value) else "identical" for target, value in values]
    costs = f"{figures.mac_reduction or 0:.2f}x MAC reduction, {figures.speedup or 0:.2f}x speedup"
    return ", ".join([*shown, f"{costs}, n={figures.images}"])
