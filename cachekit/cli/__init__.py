"""The command line; torch and diffusers are imported only by the commands that need them."""

from __future__ import annotations

import typer

from cachekit.cli import (
    analyze,
    application,
    bench,
    calibrate,
    check,
    coverage,
    demo,
    doctor,
    estimate,
    generate,
    inspection,
    new,
    recommend,
    tune,
)
from cachekit.cli.output import Group

__all__ = ["app"]

app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("list")(inspection.list_installed)
app.command()(inspection.show)
app.command()(inspection.sites)
app.command()(inspection.plan)
app.command()(estimate.estimate)
app.command()(recommend.recommend)
app.command()(generate.generate)
app.command()(demo.demo)
app.command()(application.app)
app.add_typer(bench.app, name="bench")
app.command()(analyze.analyze)
app.command()(calibrate.calibrate)
app.command()(tune.tune)
app.command()(check.check)
app.command()(coverage.coverage)
app.command()(new.new_policy)
app.command()(new.new_adapter)
app.command()(doctor.doctor)


@app.callback()
def _cachekit() -> None:
    """Apply, combine and measure caching policies on diffusion pipelines."""
