"""The terms of calibrated sums: what they are called, and whether a file has those of its branches and full steps."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cachekit.tools.calibrating.fits import Figures, Fit
    from cachekit.tools.calibrating.key import Key

#: What the entries of a history are called, the newest first.
AGES = ("last", "before")
FRESH = "fresh"
SAMPLE = "sample"


def misfit(key: Key, fits: Sequence[Fit] | Sequence[Figures]) -> str:
    """Describe what contradicts itself in a calibration, "" if nothing does."""
    scales = [fit.guidance for fit in fits]
    if scales != sorted(set(scales)):
        return f"guidance scales {scales} are not in order"
    if key.timesteps and len(key.timesteps) != key.steps:
        return f"{len(key.timesteps)} timesteps for {key.steps} steps"
    for fit in fits:
        if len(fit.steps) != key.steps:
            return f"{len(fit.steps)} fits for {key.steps} steps"
        if fit.terms != fits[0].terms:
            return "terms differ between guidance scales"
    return ""


def misfit_of_weights(key: Key, terms: Sequence[Set[str]]) -> str:
    """Describe a contradiction between a calibration's full steps and the terms of each step's weights."""
    full = key.full
    if not full or full[0] != 0 or full != sorted(set(full)) or full[-1] >= key.steps:
        listed = ";".join(map(str, full)) or "none"
        return f"full steps {listed} are not those of a run of {key.steps} steps, in order from 0 on"
    running = [_branches_of(names, key.branches) for names in terms]
    stays = all(found == key.branches for found in running)
    for step, (names, branches) in enumerate(zip(terms, running)):
        earlier = min(sum(other < step for other in full), len(AGES))
        # Where a pipeline has ended or paused guidance, less may be kept of the branches that run.
        expected = [_terms(key, step, branches, count) for count in range(earlier if stays else 0, earlier + 1)]
        if names not in expected:
            wanted = ", ".join(sorted(expected[-1])) or "others"
            found = ", ".join(sorted(names))
            return f"step {step} has weights for {found}, where its branches and full steps give {wanted}"
    return ""


def _branches_of(names: Set[str], branches: Sequence[str]) -> list[str]:
    """List the branches that run in a step with these terms."""
    return [branch for branch in branches if any(name.endswith(f".{branch}") for name in names)]


def _terms(key: Key, step: int, branches: Sequence[str], kept: int) -> Set[str]:
    """Name the terms of a step in which `kept` outputs of earlier full steps are kept: see `terms_of`."""
    ages = [*([FRESH] if step in key.full else []), *AGES[:kept]]
    is_joint = len(branches) > 1 and not key.separate
    samples = [SAMPLE] if is_joint else [f"{SAMPLE}.{branch}" for branch in branches]
    return {*samples, *(f"{age}.{branch}" for age in ages for branch in branches)}
