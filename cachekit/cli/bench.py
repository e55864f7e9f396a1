"""The commands of `cachekit bench`."""

from __future__ import annotations

import typer

from cachekit.cli.coco import coco
from cachekit.cli.examples import EXAMPLES
from cachekit.cli.grid import grid
from cachekit.cli.paper import paper

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Measure policies: costs and quality, beside fewer steps and published packages."
)
app.command(epilog=EXAMPLES["bench grid"])(grid)
app.command(epilog=EXAMPLES["bench coco"])(coco)
app.command(epilog=EXAMPLES["bench paper"])(paper)
