"""Load every pipeline class, for the processes that are forked from the one that imports this."""

from __future__ import annotations

import contextlib

from cachekit.coverage import worker
from cachekit.coverage.building import pipeline_class, pipeline_names
from cachekit.errors import CachekitError

__all__ = ["worker"]

for _name in pipeline_names():
    with contextlib.suppress(CachekitError, ImportError):
        pipeline_class(_name)
