"""`cachekit calibrate`: weights of calibrated forecasts, measured on one model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachekit.cli.fresh import Fresh, fresh_prompts
from cachekit.cli.models import RUNNABLE_MODEL, Dtype, complete_runnable, runnable, warn_of_shapes
from cachekit.cli.output import JsonFile, check_writable, choice, json_results, print_table, progress_bar, say
from cachekit.errors import CachekitError
from cachekit.models.loading import SCHEDULERS

if TYPE_CHECKING:
    from cachekit.tools.calibrating.calibration import Calibration
    from cachekit.tools.calibrating.executors import Request

_PROMPTS = "File with one prompt per line, MS-COCO annotations (.json), or a number of held-out captions."
_SCHEDULER = f"Scheduler of diffusers, or {', '.join(SCHEDULERS)}; default: the model's own."
_FRESH = "Prompts to verify on, none of --prompts; default for embedded models: held-out captions."
_REFERENCE = "Steps of the uncached run that is the target; default: as many."


def calibrate(
    model: Annotated[
        str | None, typer.Argument(help=RUNNABLE_MODEL, parser=runnable, autocompletion=complete_runnable)
    ] = None,
    output: Annotated[Path, typer.Option(help="File of the calibration; scales that it has are left out.")] = Path(
        "calibration.json"
    ),
    spec: Annotated[str, typer.Option(help="Policy with weights or figures to be measured.")] = "calibrated:interval=4",
    prompts: Annotated[str, typer.Option(help=_PROMPTS)] = "16",
    steps: Annotated[int, typer.Option(min=2, help="Number of steps.")] = 25,
    guidance: Annotated[
        str | None, typer.Option(help="Guidance scales, such as '3;5;7': a set of weights for each.")
    ] = None,
    reference_steps: Annotated[int | None, typer.Option(min=2, help=_REFERENCE)] = None,
    scheduler: Annotated[str | None, typer.Option(help=_SCHEDULER)] = None,
    batch: Annotated[int, typer.Option(min=1, help="Most prompts in one call of the denoiser.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt's noise.")] = 0,
    executor: Annotated[
        str, typer.Option(help="Where batches run.", **choice(("serial", "ray"), "executor"))
    ] = "serial",
    workers: Annotated[int, typer.Option(min=1, help="Processes of the ray executor.")] = 2,
    device: Annotated[str | None, typer.Option(help="Device; default: cuda where present, else cpu.")] = None,
    dtype: Dtype = None,
    merge: Annotated[
        list[Path] | None, typer.Option(help="Calibration to put together with the others given; needs no model.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with uncached images, beside plain steps of equal cost.")
    ] = False,
    verify_prompts: Annotated[str | None, typer.Option(help=_FRESH)] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the weights of calibrated forecasts, or the figures of a policy, on a model, and write them to a file."""
    from cachekit.tools.bench.captions import read_captions
    from cachekit.tools.calibrating.calibration import Calibration
    from cachekit.tools.calibrating.executors import Request

    if merge and (verify or verify_prompts):
        raise CachekitError(
            "calibrate: --merge has no model to verify with; merge first, then verify in a call of its own"
        )
    check_writable(output)
    with json_results(json_file) as give:
        if merge:
            made = Calibration.merge(*_different(merge))
            made.save(output)
            say(f"wrote {output}")
            _print_fits(made)
            give(_data(made))
            return
        if model is None:
            raise CachekitError("calibrate: no model and nothing to merge; give a model, or --merge twice")
        request = Request(model, spec, steps, scheduler, reference_steps, batch, seed, device, dtype)
        texts = read_captions(prompts).texts
        fresh = fresh_prompts(verify_prompts, texts, model) if verify or verify_prompts else None
        made = _calibrated(request, texts, _scales(guidance, model), output, (executor, workers))
        warn_of_shapes(prompts, model)
        _print_fits(made)
        give({**_data(made), "verified": _verify(request, fresh, output) if fresh else None})


def _different(paths: Sequence[Path]) -> list[Calibration]:
    """Load calibrations to merge; raises a `CachekitError` where two are the same, which would count twice."""
    from cachekit.tools.calibrating.calibration import Calibration

    found: list[Calibration] = []
    for path in paths:
        one = Calibration.load(path)
        if one in found:
            other = paths[found.index(one)]
            raise CachekitError(
                f"calibrate: {str(path)!r} has what {str(other)!r} has, and would count twice; leave it out"
            )
        found.append(one)
    return found


def _data(made: Calibration) -> dict[str, Any]:
    """Write how a calibration was made and how well it fits, without its weights."""
    key, fits = made.key.model_dump(mode="json"), [fit.model_dump(mode="json") for fit in made.fits]
    return {"key": key, "fits": fits}


def _calibrated(
    request: Request, texts: Sequence[str], scales: Sequence[float | None], output: Path, where: tuple[str, int]
) -> Calibration:
    """Calibrate at each scale that the file lacks, write it after each, and name those that it has."""
    from cachekit.tools.calibrating.calibration import Calibration
    from cachekit.tools.calibrating.executors import EXECUTORS

    name, workers = where
    made = Calibration.load(output) if output.exists() else None
    if made:
        own = request.refuse_to_add(made, str(output), texts[0], scales[0])
        scales = [own if scale is None else scale for scale in scales]
        for fit in made.fits:
            if fit.guidance in scales:
                say(
                    f"guidance scale {fit.guidance:g} is in {output} already, with {fit.prompts} prompts; give another"
                    " --output to measure anew"
                )
        if set(scales) <= set(made.scales):
            return made
    with progress_bar("calibrate") as show:
        for scale in scales:
            if made and scale in made.scales:
                continue
            label = "calibrate" if scale is None else f"guidance {scale:g}"
            found = EXECUTORS[name](request, texts, scale, partial(show, name=label), workers)
            made = Calibration.merge(made, found) if made else found
            made.save(output)
    say(f"wrote {output}")
    assert made is not None, "there is at least one scale"
    return made


def _scales(text: str | None, model: str) -> list[float | None]:
    from cachekit.models.demo import DEMO_GUIDANCE
    from cachekit.models.names import DEMOS, canonical

    if text is None:
        return [DEMO_GUIDANCE if canonical(model) in DEMOS else None]
    try:
        return [float(item) for item in text.split(";") if item.strip()] or [None]
    except ValueError:
        raise CachekitError(f"guidance {text!r} is not a list of numbers; write '3;5;7'") from None


def _print_fits(made: Calibration) -> None:
    """Print how well each scale fits."""
    from cachekit.tools.calibrating.fits import Fit

    rows = []
    for fit in (fit for fit in made.fits if isinstance(fit, Fit)):
        errors = [step.error for step in fit.steps]
        runs = f"{fit.runs} merged" if fit.runs > 1 else "one"
        mean, greatest = f"{sum(errors) / len(errors):.3f}", f"{max(errors):.3f}"
        rows.append([f"{fit.guidance:g}", str(fit.prompts), runs, mean, greatest])
    if rows:
        print_table(
            ["guidance", "prompts", "runs", "mean error", "greatest error"],
            rows,
            "Errors are of a step's output, relative to what would lead back to the uncached trajectory.",
        )
    else:
        _print_figures(made)


def _print_figures(made: Calibration) -> None:
    """Print each figure's range over the steps."""
    steps, rows = made.figures, []
    for name in sorted({name for step in steps for name in step}):
        values = [step[name] for step in steps if name in step]
        rows.append([name, str(len(values)), *(f"{value:.4g}" for value in (min(values), values[-1], max(values)))])
    print_table(
        ["figure", "steps", "least", "last", "greatest"], rows, f"Figures of {made.key.schedule}{_merged(made)}."
    )


def _merged(made: Calibration) -> str:
    """Write how many runs the file was merged from, "" if it wasn't."""
    counts = [fit.runs for fit in made.fits]
    return f", merged from {max(counts)} runs" if max(counts) > 1 else ""


def _verify(request: Request, fresh: Fresh, output: Path) -> list[dict[str, Any]]:
    """Print and list how close images of fresh prompts come to uncached ones, calibrated and by fewer plain steps."""
    from cachekit.tools.calibrating.verifying import compare

    found = compare(request, fresh.texts, str(output))
    rows = [[f"{scale:g}", name, str(calls), f"{psnr:.1f}"] for scale, name, calls, psnr in found]
    print_table(
        ["guidance", "images", "MACs in steps", "PSNR (dB)"],
        rows,
        f"Medians over {fresh.description} that the calibration wasn't made with, and noise of their own.",
    )
    return [dict(zip(("guidance", "images", "steps", "psnr"), row)) for row in found]
