"""Measure how far calibrations carry: `python -m benchmarks.carry [unet|dit ...]`.

A calibration of the embedded models is used for something else than it was made for, beside one that is made for it,
the linear forecast and plain steps of equal cost. Where its key refuses that, the weights are used under another key.
Then fewer calls of longer runs are compared with images of many steps. Rows that the results have stay.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

import cachekit
from cachekit.models.demo import heldout_captions
from cachekit.models.demo.scenes import caption, scenes
from cachekit.models.loading import scheduler_for
from cachekit.tools.calibrating.verifying import psnr
from cachekit.upstream.pipelines import denoiser_of

from .calibrations import PROMPTS, SCHEDULERS, captions
from .nearness import best_of, images, plain_steps

RESULTS = Path(__file__).parent / "results" / "carry.json"
#: The run that calibrations are used in, and how many held-out captions it draws.
STEPS, INTERVAL, COUNT = 25, 4, 12
#: The longer run, the one whose images are the aim, the plain one beside it, and how many captions they draw.
LONG, LONG_INTERVAL, AIM, PLAIN, LONG_COUNT = 50, 8, 200, 25, 24
MODELS = ("unet", "dit")
#: Seed of the captions that images are drawn of.
HELDOUT = 77


@dataclass(frozen=True)
class Conditions:
    """What a calibration is made in, or used in.

    `prompts` is a kind of prompts, `side` the size of images in pixels, and `lora` the norm of what a LoRA adds to each
    attention weight, relative to the weight's own.
    """

    guidance: tuple[float, ...] = (3.5,)
    prompts: str = "captions"
    side: int | None = None
    lora: float = 0.0

    @property
    def size(self) -> dict[str, Any]:
        """Arguments of a call for the size."""
        return {"height": self.side, "width": self.side} if self.side else {}


USUAL = Conditions()
BOTH = Conditions(guidance=(3.5, 5.0))
#: What is compared: its name, what the calibration is made in, and what it is used in.
USES: dict[str, tuple[Conditions, Conditions]] = {
    "what it was made for, guidance 3.5": (BOTH, USUAL),
    "guidance 4, between 3.5 and 5": (BOTH, Conditions(guidance=(4.0,))),
    "guidance 4.5, between 3.5 and 5": (BOTH, Conditions(guidance=(4.5,))),
    "what it was made for, guidance 5": (BOTH, Conditions(guidance=(5.0,))),
    "guidance 5, made at 3.5": (USUAL, Conditions(guidance=(5.0,))),
    "captions, made with single red circles": (Conditions(prompts="red circles"), USUAL),
    "empty prompts, made with captions": (USUAL, Conditions(prompts="empty")),
    "words in random order, made with captions": (USUAL, Conditions(prompts="shuffled")),
    "48 x 48 pixels, made at 64 x 64": (USUAL, Conditions(side=48)),
    "96 x 96 pixels, made at 64 x 64": (USUAL, Conditions(side=96)),
    "a LoRA of 0.03, made without": (USUAL, Conditions(lora=0.03)),
    "a LoRA of 0.1, made without": (USUAL, Conditions(lora=0.1)),
    "a LoRA of 0.3, made without": (USUAL, Conditions(lora=0.3)),
}


def main() -> None:
    """Parse the command line and measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", choices=[*MODELS, []], help="default: both")
    parser.add_argument("--scheduler", action="append", choices=SCHEDULERS, help="default: both")
    parser.add_argument("--part", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for part in options.part or PARTS:
        for model, scheduler in product(options.models or MODELS, options.scheduler or SCHEDULERS):
            for name in PARTS[part]:
                add(part, name, model, scheduler, options.device)


def add(part: str, name: str, model: str, scheduler: str, device: str = "cpu") -> None:
    """Measure a row, unless the results have it."""
    row = {"part": part, "name": name, "model": model, "scheduler": scheduler}
    if any(row.items() <= other.items() for other in stored()):
        return
    measure = {"uses": used, "longer": longer, "batch": batched}[part]
    row |= measure(Bench.of(model, scheduler, device), name)
    RESULTS.write_text(json.dumps([*stored(), row], indent=1) + "\n")
    print(row, flush=True)


def stored() -> list[dict[str, Any]]:
    """Read the results."""
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return found


# -- prompts and models ------------------------------------------------------------------------------------


def prompts_of(kind: str, count: int, heldout: bool) -> list[str]:
    """List prompts of a kind, `heldout` for images and others for calibrations."""
    if kind == "empty":
        return [""] * count
    if kind == "red circles":
        return list(islice(_red_circles(), count))
    found = heldout_captions(count, seed=HELDOUT) if heldout else captions()[:count]
    return [_shuffled(text, place) for place, text in enumerate(found)] if kind == "shuffled" else list(found)


def _red_circles() -> Iterator[str]:
    for scene in scenes(np.random.default_rng(12), heldout=False):
        (thing, *others) = scene.things
        if not others and (thing.colour, thing.shape) == ("red", "circle"):
            yield caption(scene)


def _shuffled(text: str, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).permutation(text.split()))


@dataclass(frozen=True)
class Bench:
    """One embedded model under one scheduler."""

    model: str
    scheduler: str
    device: str = "cpu"

    @classmethod
    @lru_cache(maxsize=1)
    def of(cls, model: str, scheduler: str, device: str) -> Bench:
        """Keep the last one."""
        return cls(model, scheduler, device)

    @lru_cache(maxsize=2)  # noqa: B019
    def pipe(self, lora: float = 0.0) -> Any:
        """Load the pipeline, with a LoRA of that strength."""
        pipe = cachekit.demo_pipeline(self.model)
        pipe.set_progress_bar_config(disable=True)
        pipe.scheduler = scheduler_for(pipe, self.scheduler)
        if lora:
            add_lora(denoiser_of(pipe), lora)
        return pipe.to(self.device)

    @cache  # noqa: B019
    def calibration(self, conditions: Conditions) -> cachekit.Calibration:
        """Calibrate in these conditions; raises `CalibrationError` for empty prompts, which equal the negative one."""
        pipe = self.pipe(conditions.lora)
        return cachekit.calibrate(
            pipe,
            f"calibrated:interval={INTERVAL}",
            prompts_of(conditions.prompts, PROMPTS, heldout=False),
            num_inference_steps=STEPS,
            guidance_scale=list(conditions.guidance),
            **conditions.size,
        )


def add_lora(denoiser: Any, strength: float) -> None:
    """Add a LoRA of rank 4 with random weights to all attention, whose norm is a part of each weight's."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=targets), denoiser)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in (module for module in denoiser.modules() if hasattr(module, "lora_A")):
            into, out = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            into.copy_(torch.randn(into.shape, generator=generator))
            out.copy_(torch.randn(out.shape, generator=generator))
            out *= strength * layer.base_layer.weight.norm() / (out @ into).norm()


# -- measurements ------------------------------------------------------------------------------------------


def used(bench: Bench, name: str) -> dict[str, Any]:
    """Compare a carried calibration with its rivals: median PSNR in dB to the uncached images."""
    making, using = USES[name]
    pipe, (scale,) = bench.pipe(using.lora), using.guidance
    prompts = prompts_of(using.prompts, COUNT, heldout=True)

    def draw(steps: int = STEPS, **table: Any) -> np.ndarray:
        return images(pipe, prompts, steps, scale, **using.size, **table)

    def cached(spec: Any) -> float:
        with cachekit.apply(pipe, spec):
            return round(psnr(draw(), uncached), 1)

    uncached, carried = draw(), bench.calibration(making)
    has_own = using.prompts != "empty"
    own = bench.calibration(using) if has_own else carried
    full = carried.key.full
    plain, spacing = best_of(plain_steps(pipe, full, STEPS, uncached, draw))
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{each}.json") for each in ("carried", "edited", "own")]
        for path, calibration in zip(paths, (carried, edited(carried, own, scale), own)):
            calibration.save(path)
        refused = refusal(pipe, paths[0], prompts[0], using)
        found = [cached(f"calibrated:file={path}") for path in paths[1:]]
    changed = {"changed": round(psnr(uncached, _without_lora(bench, prompts, scale)), 1)} if using.lora else {}
    figures = {
        "carried": found[0],
        "own": found[1] if has_own else None,
        "forecast": cached(f"forecast:interval={INTERVAL}"),
    }
    return {**figures, "plain": round(plain, 1), "spacing": spacing, "calls": len(full), "captions": COUNT,
            "refused": refused, **changed}  # fmt: skip


def _without_lora(bench: Bench, prompts: Sequence[str], scale: float) -> np.ndarray:
    return images(bench.pipe(), prompts, STEPS, scale)


def edited(carried: cachekit.Calibration, own: cachekit.Calibration, scale: float) -> cachekit.Calibration:
    """Give the weights of one calibration the key of another, and a scale where they lack it."""
    scales = carried.scales
    if scales[0] <= scale <= scales[-1]:
        return carried.model_copy(update={"key": own.key})
    fit = carried.fits[-1].model_copy(update={"guidance": scale})
    return carried.model_copy(update={"key": own.key, "fits": [fit]})


def refusal(pipe: Any, path: str, prompt: str, using: Conditions) -> str:
    """Use a file as it is for an image; get the error's reason, or "" where it is not refused."""
    try:
        with cachekit.apply(pipe, f"calibrated:file={path}"):
            images(pipe, [prompt], STEPS, using.guidance[0], **using.size)
    except cachekit.CalibrationError as error:
        return str(error).partition("the run has ")[2].partition(";")[0]
    return ""


def longer(bench: Bench, name: str) -> dict[str, Any]:
    """Compare runs with the images of many steps: median PSNR in dB."""
    pipe, prompts, scale = bench.pipe(), prompts_of("captions", LONG_COUNT, heldout=True), USUAL.guidance[0]
    aim = _aim(bench)
    if name in PLAINS:
        found = images(pipe, prompts, PLAINS[name], scale)
        return {"psnr": round(psnr(found, aim), 1), "calls": PLAINS[name], "captions": LONG_COUNT}
    made = cachekit.calibrate(
        pipe,
        f"calibrated:interval={LONG_INTERVAL}",
        captions(),
        num_inference_steps=LONG,
        guidance_scale=scale,
        reference_steps=AIM if name == AIMED else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        made.save(path := str(Path(folder) / "made.json"))
        with cachekit.apply(pipe, f"calibrated:file={path}"):
            found = images(pipe, prompts, LONG, scale)
    return {"psnr": round(psnr(found, aim), 1), "calls": len(made.key.full), "captions": LONG_COUNT}


@lru_cache(maxsize=1)
def _aim(bench: Bench) -> np.ndarray:
    return images(bench.pipe(), prompts_of("captions", LONG_COUNT, heldout=True), AIM, USUAL.guidance[0])


def batched(bench: Bench, name: str) -> dict[str, Any]:
    """Compare images of one call with those of a call each: the greatest difference of a value from 0 to 1."""
    pipe, prompts = bench.pipe(), prompts_of("captions", 8, heldout=True)
    with cachekit.apply(pipe, f"calibrated:interval={INTERVAL}"):
        together = images(pipe, prompts, STEPS, 3.5)
        alone = np.concatenate([images(pipe, [text], STEPS, 3.5, first=place) for place, text in enumerate(prompts)])
    return {"difference": float(np.abs(together - alone).max()), "images": len(prompts)}


PLAINS = {f"{PLAIN} uncached steps": PLAIN, f"{LONG} uncached steps": LONG}
TOWARDS_OWN = f"`calibrated:interval={LONG_INTERVAL}` in {LONG} steps"
AIMED = f"{TOWARDS_OWN}, calibrated with `--reference-steps {AIM}`"
PARTS: dict[str, Sequence[str]] = {
    "uses": [*USES],
    "longer": [*PLAINS, TOWARDS_OWN, AIMED],
    "batch": ["8 images in a call"],
}


if __name__ == "__main__":
    main()
