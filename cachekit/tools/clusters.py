"""Clusters of Ray: the one that is there, or one on this machine for as long as it is needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cachekit.errors import CachekitError, first_line


class ClusterError(CachekitError):
    """A cluster that can't be used, or Ray that isn't installed."""


def imported_ray() -> Any:
    """Import Ray; raises `ClusterError` where it isn't installed."""
    try:
        import ray
    except ImportError as error:
        raise ClusterError("the ray executor needs Ray: pip install 'cachekit-diffusion[ray]'") from error
    return ray


@contextmanager
def cluster(ray: Any, workers: int, threads: int) -> Iterator[None]:
    """Use the running or named cluster, or else start one on this machine; shut down only what was started here.

    Raises `ClusterError` where the cluster can't be reached.
    """
    begun = not ray.is_initialized()
    if begun:
        # Ray runs its workers at low priority, so on a busy machine their times would grow.
        first = {"worker_niceness": 0}
        own = {"address": "local", "num_cpus": workers * threads, "include_dashboard": False, "_system_config": first}
        _begin(ray, {} if os.environ.get("RAY_ADDRESS") else own)
    try:
        yield
    finally:
        if begun:
            ray.shutdown()


def _begin(ray: Any, given: dict[str, Any]) -> None:
    try:
        ray.init(log_to_driver=False, configure_logging=False, **given)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}" if not given else "Ray on this machine"
        raise ClusterError(f"cannot use {where}: {first_line(error)}; use --executor serial, or start it") from error
