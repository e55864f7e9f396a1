"""The command line; torch and diffusers are imported only by the commands that need them."""

from __future__ import annotations

from typing import Annotated

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
from cachekit.cli.examples import EXAMPLES
from cachekit.cli.output import Group, say
from cachekit.version import __version__

__all__ = ["app"]

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("list", epilog=EXAMPLES["list"])(inspection.list_installed)
app.command(epilog=EXAMPLES["show"])(inspection.show)
app.command(epilog=EXAMPLES["sites"])(inspection.sites)
app.command(epilog=EXAMPLES["plan"])(inspection.plan)
app.command(epilog=EXAMPLES["estimate"])(estimate.estimate)
app.command(epilog=EXAMPLES["recommend"])(recommend.recommend)
app.command(epilog=EXAMPLES["generate"])(generate.generate)
app.command(epilog=EXAMPLES["demo"])(demo.demo)
app.command(epilog=EXAMPLES["app"])(application.app)
app.add_typer(bench.app, name="bench")
app.command(epilog=EXAMPLES["analyze"])(analyze.analyze)
app.command(epilog=EXAMPLES["calibrate"])(calibrate.calibrate)
app.command(epilog=EXAMPLES["tune"])(tune.tune)
app.command(epilog=EXAMPLES["check"])(check.check)
app.command(epilog=EXAMPLES["coverage"])(coverage.coverage)
app.command(epilog=EXAMPLES["new-policy"])(new.new_policy)
app.command(epilog=EXAMPLES["new-adapter"])(new.new_adapter)
app.command(epilog=EXAMPLES["doctor"])(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"cachekit {__version__}")
        raise typer.Exit


@app.callback()
def _cachekit(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Apply, combine and measure caching policies on diffusion pipelines."""
