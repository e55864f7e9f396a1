"""Pictures of plans for the documents, on white as pictures of a page that may be dark."""

from __future__ import annotations

import cachekit

#: What docs/how-it-works.md shows.
SPECS = ["tgate:m=13", "deepcache:interval=3"]


def plan() -> str:
    """Draw a plan of 25 steps on the embedded UNet."""
    with cachekit.apply(cachekit.demo_pipeline(), SPECS) as attachment:
        drawn: str = attachment.plan(25).picture()
    return drawn.replace("<svg ", "<svg style='background:#fff' ", 1)
