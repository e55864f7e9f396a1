"""What a switch in compiled code can be ordered to do."""

from __future__ import annotations

from enum import IntEnum


class Order(IntEnum):
    """What a switch does with one call of its module, decided before it; of two needs the higher one counts."""

    #: Run the module.
    RUN = 0
    #: Run it and record the shapes of its output.
    MEASURE = 1
    #: Run it and hand over its output, for the cache.
    KEEP = 2
    #: Skip it: the output is known before the call.
    REUSE = 3
    #: Skip it: the output is made within the call, from what enters the region.
    RESTORE = 4
