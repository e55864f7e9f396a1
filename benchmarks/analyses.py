"""Analyze the embedded models: `python -m benchmarks.analyses [MODEL ...]`.

Each is one `cachekit analyze` command, whose tables are kept beside the figures that sentences are made of.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cachekit.cli import app
from cachekit.tools.analysis.comparing import TEXT_FIRST
from cachekit.tools.analysis.parts import changes_chart, noise_chart
from cachekit.tools.bench.figures import FIGURES

from .ship import RESULTS

MODELS = ("demo", "demo-dit", "demo-flow", "demo-lcm")
_CAPTIONS = 32
_COMPARED = ("text", "lengths", "schedulers")


def main() -> None:
    """Parse the command line and analyze the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: all, one after the other")
    for model in parser.parse_args().models or MODELS:
        analyze(model)


def analyze(model: str) -> None:
    """Analyze a model, and keep its tables and its figures but for those of single sites and images."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        app([*_command(model), "--output", folder], standalone_mode=False)
        _tables(model).write_text((output / "tables.md").read_text())
        data = json.loads((output / "analysis.json").read_text())
    for curve in data["changes"].values():
        del curve["by_site"]
    for part in _COMPARED:
        data[part] = data[part]["orders"]
    _figures(model).write_text(json.dumps(data, indent=1) + "\n")


def tables(model: str) -> str:
    """Tables that the command wrote for an embedded model, after the command, seed and versions they are from."""
    if not _figures(model).exists():
        return ""
    made = json.loads(_figures(model).read_text())["settings"]
    used = made["environment"]
    return (
        f"`{' '.join(['cachekit', *_command(model)])}`, {made['steps']} steps, seed {made['seed']}, cachekit"
        f" {used['cachekit']}, torch {used['torch']}, diffusers {used['diffusers']}:\n\n{_tables(model).read_text()}"
    )


def read(model: str) -> str:
    """Say what the figures show of the changes, and of the text in a part of the steps."""
    if not _figures(model).exists():
        return ""
    data = json.loads(_figures(model).read_text())
    kind = next(kind for kind in ("cross_attention", "joint_attention") if kind in data["changes"])
    means = [mean for mean in data["changes"][kind]["relative"]["mean"] if mean is not None]
    start, middle, end = (f"{100 * mean:.1f} %" for mean in (means[0], means[len(means) // 2], means[-1]))
    changes = (
        f"{kind.replace('_', '-').capitalize()} changes by {start} of its norm after the first step, by {middle} half"
        f" way and by {end} in the last step."
    )
    # The last gate under the model's own scheduler is in several parts.
    found = [*{_place(order): order for part in _COMPARED for order in data[part]}.values()]
    return " ".join([changes, *_text_in_part(found), *_counts(found)])


def pictures() -> dict[str, str]:
    """Draw the curves of each model, by name: the changes of its outputs, and the noise that it predicts."""
    found: dict[str, str] = {}
    for model in MODELS:
        if _figures(model).exists():
            data = json.loads(_figures(model).read_text())
            found |= {f"changes-{model}": changes_chart(data["changes"])}
            found |= {f"noise-{model}": noise_chart(data["noise"])} if data["noise"] else {}
    return found


def _place(order: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(order[name] for name in ("spec", "scheduler", "steps", "figure"))


def _text_in_part(found: list[dict[str, Any]]) -> Iterator[str]:
    shown = [one for one in found if one["figure"] == "caption_match" and one["spec"].startswith(TEXT_FIRST)]
    if shown:
        early, late = (_range([one[key] for one in shown]) for key in ("row", "text_last"))
        yield f"Text before a gate alone shows {early} of the captions, text from the gate on alone {late}."


def _counts(found: list[dict[str, Any]]) -> Iterator[str]:
    """Count the comparisons that are in the papers' order, by figure."""
    for name, is_kind in (("text in a part of the steps", True), ("`tgate`", False)):
        own = [one for one in found if one["spec"].startswith(TEXT_FIRST) == is_kind]
        counts = [_count(key, [one for one in own if one["figure"] == key]) for key in FIGURES]
        if own:
            yield f"Comparisons in the papers' order, {name}: {', '.join(filter(None, counts))}."


def _count(figure: str, found: list[Mapping[str, Any]]) -> str:
    if not found:
        return ""
    ties = sum(one["is_tie"] for one in found)
    holding = sum(one["is_papers_order"] and not one["is_tie"] for one in found)
    tied = f" and {ties} {'tie' if ties == 1 else 'ties'}" if ties else ""
    return f"{holding}{tied} of {len(found)} by {FIGURES[figure].name}"


def _range(shares: list[float]) -> str:
    least, most = (f"{100 * share:.0f} %" for share in (min(shares), max(shares)))
    return least if least == most else f"{least.removesuffix(' %')} to {most}"


def _command(model: str) -> list[str]:
    return ["analyze", model, "--captions", str(_CAPTIONS), "--threads", "1"]


def _tables(model: str) -> Path:
    return RESULTS / f"analysis-{model}.md"


def _figures(model: str) -> Path:
    return RESULTS / f"analysis-{model}.json"


if __name__ == "__main__":
    main()
