"""Load every pipeline class on import, so that the processes forked from this one share them."""

from __future__ import annotations

import contextlib

from cachekit.errors import CachekitError
from cachekit.tools.coverage import worker
from cachekit.tools.coverage.building import pipeline_class, pipeline_names

__all__ = ["worker"]

for _name in pipeline_names():
    with contextlib.suppress(CachekitError, ImportError):
        pipeline_class(_name)
