"""The tables of docs/recipes: what `cachekit recommend` prints for each architecture, and which policies are refused.

`python -m benchmarks.recipes` stores them, in a few minutes and without weights; `python -m benchmarks.readme` writes
them into the documents.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from cachekit.driving.setup import Setup
from cachekit.errors import CachekitError
from cachekit.interface.specs import parse
from cachekit.models.architectures import architecture, architectures
from cachekit.registry.catalog import installed
from cachekit.tools.bench.figures import size
from cachekit.tools.bench.tables import markdown
from cachekit.tools.tuning.recommend import recommend

RESULTS = Path(__file__).parent / "results" / "recipes.json"
#: Policies that need a file, which only a model has.
_NEEDED = {"calibrated": "calibrated:interval=4", "null_text": "null_text:after=10"}
#: Policies that are another's name or a tool.
_LEFT_OUT = {"cache", "cair"}
#: Families in the order of docs/recipes, with their pages.
_FAMILIES = {
    "sd15": ("Stable Diffusion 1.5", "sd15.md"),
    "sd21": ("Stable Diffusion 2.1", "sd15.md"),
    "sdxl": ("Stable Diffusion XL", "sdxl.md"),
    "pixart-alpha": ("PixArt-alpha", "pixart.md"),
    "pixart-sigma": ("PixArt-sigma", "pixart.md"),
    "dit-xl": ("DiT-XL", "pixart.md"),
    "sd3": ("Stable Diffusion 3.5", "sd3.md"),
    "flux": ("FLUX.1", "flux.md"),
    "qwen-image": ("Qwen-Image", "qwen-image.md"),
    "wan": ("Wan 2.1", "wan.md"),
    "hunyuan-video": ("HunyuanVideo", "video.md"),
    "cogvideox": ("CogVideoX", "video.md"),
    "lcm-sdxl": ("LCM of SDXL", "few-steps.md"),
    "lcm-pixart": ("LCM of PixArt-alpha", "few-steps.md"),
}


def main() -> None:
    """Store the recommendations for all architectures."""
    stored = {}
    for name in architectures():
        stored[name] = {**recommend(name).data(), "refused": refused(name)}
        print(f"{name}: {len(stored[name]['settings'])} settings, {len(stored[name]['refused'])} refused")
    RESULTS.write_text(json.dumps(stored, indent=1) + "\n")


def refused(name: str) -> dict[str, str]:
    """Find the policies that an architecture has no sites for, with the error of each."""
    found, denoiser = {}, architecture(name).build()
    for policy in sorted(set(installed().policies) - _LEFT_OUT):
        try:
            Setup.of({"": denoiser}, [parse(_NEEDED.get(policy, policy), installed())], installed())
        except CachekitError as error:
            found[policy] = str(error)
    return found


def parts() -> dict[str, str]:
    """Tables by the names of their markers."""
    stored = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {f"recipe {name}": _recipe(data) for name, data in stored.items()}
    found |= {f"refused {name}": _refused(data) for name, data in stored.items()}
    return {**found, "families": _families(stored)}


def _families(stored: dict[str, Any]) -> str:
    """Table of what is recommended as balanced for each family."""
    rows = []
    for name, (title, page) in _FAMILIES.items():
        if name in stored:
            line = next((one for one in stored[name]["lines"] if one["level"] == "balanced"), None)
            rows.append([f"[{title}]({page})", stored[name]["guidance"], *_balanced(line)])
    return markdown(["family", "guidance", "balanced", "MAC reduction", "kept"], rows, left=3) if rows else ""


def _balanced(line: dict[str, Any] | None) -> list[str]:
    if line is None:
        return ["fewer steps", "-", "-"]
    text = line["code"].partition(", ")[2].removesuffix(")").strip('"')
    return [f"`{text}`", *_costs(line["costs"])]


def _recipe(data: dict[str, Any]) -> str:
    """Facts, published settings and lines of one architecture."""
    sites = ", ".join(f"{kind} x {count}" for kind, count in data["sites"].items())
    facts = [
        ["denoiser", f"`{data['denoiser']}`, adapter `{data['adapter']}`"],
        ["sites", sites],
        ["a run", f"`{data['scheduler']}`, {data['steps']} steps, {data['guidance']}"],
    ]
    text = markdown([f"`{data['model']}`", ""], facts, left=2)
    fitting = [one for one in data["settings"] if not one["refused"]]
    if fitting:
        rows = [
            [f"`preset:{one['name']}`", f"{one['costs']['steps']}", *_costs(one["costs"]), one["source"]]
            for one in fitting
        ]
        text += "\n" + markdown(["published setting", "steps", "MAC reduction", "kept", "source"], rows, left=5)
    if data["lines"]:
        text += "\n" + markdown(["level", "line", "MAC reduction", "kept", "why"], _lines(data), left=5)
    return text if not data["note"] else f"{text}\n{data['note'][0].upper()}{data['note'][1:]}.\n"


def _lines(data: dict[str, Any]) -> list[list[str]]:
    rows = []
    for line in data["lines"]:
        why = f"{line['why']}; first make its weights: `{line['first']}`" if line["first"] else line["why"]
        rows.append([line["level"], f"`{line['code']}`", *_costs(line["costs"]), why])
    return rows


def _costs(costs: dict[str, Any]) -> list[str]:
    if costs["mac_reduction"] is None:
        return ["unknown", "unknown"]
    return ["in the run" if costs["open"] else f"{costs['mac_reduction']:.2f}x", size(costs["cache_bytes"])]


def _refused(data: dict[str, Any]) -> str:
    """Policies by the error that refuses them; their own names in it are left out."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name, error in data["refused"].items():
        groups[error.partition(": ")[2]].append(f"`{name}`")
    rows = [[", ".join(names), reason.replace("|", "\\|")] for reason, names in groups.items()]
    return markdown(["refused", "with"], rows, left=2) if rows else "Every policy that ships finds its sites here.\n"


if __name__ == "__main__":
    main()
