"""Work that ends its process: a module of its own, which workers import quickly."""

from __future__ import annotations

import os
import signal


class Deadly:
    """Puts words into capitals, and ends its process at "x"."""

    threads, device = 1, "cpu"

    def do(self, item):
        if item == "x":
            os.kill(os.getpid(), signal.SIGKILL)
        return item.upper()
