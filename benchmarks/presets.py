"""Write the presets of the embedded models: `python -m benchmarks.presets`.

They are the forecasts that `benchmarks.frontier` measured, and what `benchmarks.tuned` found for each target. Without
results of the model's present weights, a forecast has no figures, and what was found for a target is left out, as it is
where plain steps are better, and for runs of few steps: what one set of captions shows there, another doesn't.
`--check` writes nothing, and fails where a file is stale.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Iterator
from typing import Any

from cachekit.interface.presets import FOLDER, HERE, Evidence, Figures, PlainSteps, Preset
from cachekit.models.demo import DEMO_GUIDANCE, DEMO_STEPS
from cachekit.models.demo.pipeline import PIPELINES
from cachekit.models.loading import pipeline
from cachekit.models.names import DEMOS
from cachekit.tools.bench.subjects import model_hash
from cachekit.tools.bench.summary import Group, Row
from cachekit.tools.tuning.recommend import RULES
from cachekit.upstream.fingerprints import fingerprint
from cachekit.upstream.pipelines import denoiser_of
from cachekit.upstream.schedulers import scheduler_of

from . import tuned
from .frontier import MODELS, stored
from .ship import RESULTS

#: The forecasts that ship for each model, and what they are.
SPECS = {
    "forecast:interval=2": "A line through the last two outputs in every second step",
    "calibrated:interval=2": "Calibrated forecasts in every second step",
    "calibrated:interval=3": "Calibrated forecasts, with a full step in three",
    "calibrated:interval=4": "Calibrated forecasts, with a full step in four",
    "calibrated:interval=5": "Calibrated forecasts, with a full step in five",
    "calibrated:interval=6": "Calibrated forecasts, with a full step in six",
}
#: What tunings were for: the end of the preset's name, and what it is.
TUNED = {
    "-1%": ("captions", "The cheapest found that shows at most one caption in a hundred fewer"),
    "35dB": ("35db", "The cheapest found with at least 35 dB"),
}


def main() -> None:
    """Write what is stale, or fail with `--check`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail where a preset is stale")
    options = parser.parse_args()
    wanted = dict(made())
    stale = {name: preset for name, preset in wanted.items() if not _is_current(name, preset)}
    gone = [path for path in FOLDER.glob("*-tuned-*.json") if path.stem not in wanted]
    if options.check and (stale or gone):
        names = [*stale, *(path.stem for path in gone)]
        raise SystemExit(f"stale: {', '.join(names)}; run python -m benchmarks.presets")
    for path in gone:
        path.unlink()
        print(f"removed {path.stem}")
    for name, preset in stale.items():
        preset.save(FOLDER / f"{name}.json")
        print(f"wrote {name}")


def made() -> Iterator[tuple[str, Preset]]:
    """Make each preset, with its name."""
    for model in MODELS:
        yield from _forecasts(model)
    yield from _tuned()


def _forecasts(model: str) -> Iterator[tuple[str, Preset]]:
    pipe = _pipeline(model)
    found = group_of(model, type(scheduler_of(pipe)).__name__)
    shared: dict[str, Any] = {
        "pipeline": PIPELINES[DEMOS[model]],
        "denoiser": type(denoiser_of(pipe)).__name__,
        "model": _digest(model),
        "scheduler": type(scheduler_of(pipe)).__name__,
        "steps": DEMO_STEPS,
        "reference_steps": DEMO_STEPS,
        "guidance": DEMO_GUIDANCE,
    }
    for spec, summary in SPECS.items():
        policy, _, keys = spec.partition(":")
        evidence = Evidence(**shared, **(measured(found, spec) if found else {}))
        requires = {policy: "cachekit-diffusion"}
        yield (
            f"{model}-{policy}-{keys.rpartition('=')[2]}",
            Preset(summary=summary, specs=[spec], requires=requires, evidence=evidence),
        )


def _tuned() -> Iterator[tuple[str, Preset]]:
    """Give what was found for each target a name; that of other weights is left out."""
    for row in tuned.stored():
        preset = row["preset"] and Preset.model_validate(row["preset"])
        if not preset or _has_few_steps(preset.evidence) or preset.evidence.model != _digest(row["model"]):
            continue
        # Weights that were made for a tuning don't ship, nor does what plain steps are better than.
        if not row["rival"] and not any(HERE in spec for spec in preset.specs):
            name, summary = TUNED[row["target"]]
            yield f"{row['model']}-tuned-{name}", preset.model_copy(update={"summary": summary})


@functools.cache
def _pipeline(model: str) -> Any:
    return pipeline(model)


@functools.cache
def _digest(model: str) -> str:
    return fingerprint(denoiser_of(_pipeline(model)))


def _has_few_steps(evidence: Evidence) -> bool:
    steps = evidence.reference_steps or evidence.steps
    return steps is not None and steps < RULES.few_steps


def _is_current(name: str, preset: Preset) -> bool:
    path = FOLDER / f"{name}.json"
    return path.exists() and Preset.load(path) == preset


def group_of(model: str, scheduler: str) -> Group | None:
    """Find the results of a model's present weights with its own scheduler; None where there are none."""
    wanted = (model_hash(model), scheduler, DEMO_GUIDANCE)
    groups = stored(RESULTS / f"frontier-{model}.jsonl")
    cells = ((group, group.cell) for group in groups)
    return next((group for group, cell in cells if (cell.model_hash, cell.scheduler, cell.guidance) == wanted), None)


def measured(group: Group, spec: str) -> dict[str, Any]:
    """Collect the figures of a spec, and those of the best plain steps of equal cost; nothing where it wasn't run."""
    row = next((row for row in group.rows if row.cell.specs == (spec,)), None)
    if row is None:
        return {}
    plain = group.best_plain(row.plain_steps()["MACs"])
    beside = PlainSteps(steps=plain.cell.steps, spacing=plain.cell.spacing, figures=_figures(plain)) if plain else None
    shown = {name: str(group.environment[name]) for name in ("cachekit", "diffusers", "torch")}
    figures = _figures(row).model_copy(update={"uncached_caption_match": group.uncached.caption_match})
    return {"figures": figures, "plain": beside, "versions": shown}


def _figures(row: Row) -> Figures:
    return Figures(
        images=len(row.samples),
        psnr=_rounded(row.psnr, 2),
        ssim=_rounded(row.ssim, 4),
        caption_match=row.caption_match,
        checked=row.checked_images,
        macs=row.macs,
        mac_reduction=_rounded(row.mac_reduction, 3),
        seconds=_rounded(row.seconds, 4),
        speedup=_rounded(row.speedup, 3),
    )


def _rounded(value: float | None, digits: int) -> float | None:
    """Round a figure; that of identical images, which is infinite, is None as in a preset."""
    return None if value is None or math.isinf(value) else round(value, digits)


if __name__ == "__main__":
    main()
