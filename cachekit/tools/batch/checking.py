"""Checks of a batch before its model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from cachekit.driving.setup import Setup
from cachekit.interface.specs import parse_all
from cachekit.models.loading import denoiser_from_config, precision
from cachekit.registry.catalog import installed
from cachekit.tools.batch.drawing import Job

__all__ = ["check_job"]


def check_job(job: Job, specs: Sequence[str]) -> None:
    """Refuse a model that can't be found, and specs for all rows that don't fit its denoiser, by configs alone.

    Raises a `CachekitError` as `apply` does.
    """
    precision(job.dtype)
    policies = parse_all(specs, installed())
    if policies:
        Setup.of({"": denoiser_from_config(job.model)}, policies, installed())
