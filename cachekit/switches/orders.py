"""The orders that a switch in compiled code can follow."""

from __future__ import annotations

from enum import IntEnum


class Order(IntEnum):
    """What a switch does with one call of its module; the highest that any role needs applies."""

    #: Run the module.
    RUN = 0
    #: Run it and record the shapes of its output.
    MEASURE = 1
    #: Run it and hand over its output.
    KEEP = 2
    #: Skip it: the output is known before the call.
    REUSE = 3
    #: Skip it: the output is made within the call, from what enters the region.
    RESTORE = 4
