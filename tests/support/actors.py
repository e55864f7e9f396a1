"""Actors of a Ray cluster that this process has started."""

from __future__ import annotations

import psutil


def kill_an_actor() -> None:
    """End the process of one actor, as the lack of memory on its machine would."""
    titles = {child: " ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)}
    actor = next(child for child, title in titles.items() if title.startswith("ray::_Actor"))
    actor.kill()
    actor.wait(10)
