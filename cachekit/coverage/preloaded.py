"""Load every pipeline class once, for all the processes that are made from the one that does."""

from __future__ import annotations

import contextlib

from ..errors import CachekitError
from . import worker
from .building import pipeline_class, pipeline_names

__all__ = ["worker"]

for _name in pipeline_names():
    with contextlib.suppress(CachekitError, ImportError):
        pipeline_class(_name)
