"""Compare calibrated images with uncached ones, beside plain steps of equal cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from cachekit.applying import apply
from cachekit.errors import CalibrationError
from cachekit.interface.policy import Policy
from cachekit.interface.specs import parse
from cachekit.registry.catalog import installed
from cachekit.tools.calibrating.calibrate import Given, choice_of
from cachekit.tools.calibrating.calibration import Calibration
from cachekit.tools.calibrating.executors import Request
from cachekit.tools.calibrating.fits import Figures
from cachekit.tools.calibrating.standins import Calibrated
from cachekit.upstream.calling import OUTPUT, STEPS, results_of
from cachekit.upstream.pipelines import hide_progress
from cachekit.upstream.scales import scale_argument

#: What is added to the seeds of a calibration, so that the noise is another.
_OTHER_NOISE = 100_000


def compare(request: Request, prompts: Sequence[str], path: str) -> Iterator[tuple[float, str, int, float]]:
    """Yield guidance scale, kind of images, MACs in steps, and the median PSNR in dB to uncached images.

    Prompts should be others than those that the calibration at `path` was made with, which would flatter it.
    """
    made, pipe = Calibration.load(path), request.load()
    hide_progress(pipe)
    policy = policy_with(made, request.spec, path)
    for scale in made.scales:
        wanted = _images(request, pipe, prompts, request.steps, scale)
        with apply(pipe, policy) as attachment:
            cached = _images(request, pipe, prompts, request.steps, scale)
            report = attachment.report()
        cost = max(2, round(request.steps * report.macs / report.baseline_macs))
        yield scale, "calibrated", cost, psnr(cached, wanted)
        yield scale, f"{cost} plain steps", cost, psnr(_images(request, pipe, prompts, cost, scale), wanted)


def policy_with(made: Calibration, spec: str, path: str) -> Policy:
    """Make the policy of a spec with a calibration's file; raises `CalibrationError` where it takes none."""
    policy = parse(spec, installed())
    if not isinstance(made.fits[0], Figures):
        return Given.of({"denoiser": choice_of(policy).with_parts(what=Calibrated(file=path))})
    if "file" not in type(policy).model_fields:
        raise CalibrationError(f"{policy}: takes no file=, so its figures can't be verified; use a policy that does")
    return type(policy)(**{**dict(policy.given()), "file": path})


def psnr(images: Iterable[np.ndarray], wanted: Iterable[np.ndarray]) -> float:
    """Compute the median PSNR in dB of images or videos with values from 0 to 1."""
    errors = [max(float(((one - other) ** 2).mean()), 1e-12) for one, other in zip(images, wanted)]
    return float(np.median([-10 * np.log10(error) for error in errors]))


def _images(request: Request, pipe: Any, prompts: Sequence[str], steps: int, scale: float) -> list[np.ndarray]:
    """Make an image or video of each prompt, one by one."""
    import torch

    made = []
    for place, prompt in enumerate(prompts):
        noise = torch.Generator().manual_seed(request.seed + _OTHER_NOISE + place)
        given = {"prompt": prompt, STEPS: steps, "generator": noise, OUTPUT: "np"}
        result = pipe(**given, **{scale_argument({}): scale})
        made.append(np.asarray(results_of(result))[0])
    return made
