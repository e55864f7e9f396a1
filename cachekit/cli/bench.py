"""The commands of `cachekit bench`."""

from __future__ import annotations

import typer

from cachekit.cli import coco, grid, paper

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Measure policies: costs and quality, beside fewer steps and published packages."
)
app.command()(grid.grid)
app.command()(coco.coco)
app.command()(paper.paper)
