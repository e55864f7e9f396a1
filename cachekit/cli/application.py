"""`cachekit app`: policies chosen, planned and compared in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from cachekit.cli.demo import SPECS
from cachekit.cli.models import Dtype, any_model, complete_any
from cachekit.cli.output import say
from cachekit.models.names import EMBEDDED

_MODEL = f"Folder or hub id of a diffusers pipeline, {EMBEDDED}, or an architecture such as sdxl, for estimates alone."
#: The address on which only this machine can reach the page.
_LOCAL = "127.0.0.1"
_HOST = "Address to listen on; others than this machine reach the page only on another one, such as 0.0.0.0."


def app(
    model: Annotated[str, typer.Argument(help=_MODEL, parser=any_model, autocompletion=complete_any)] = "demo",
    spec: Annotated[list[str] | None, typer.Option(help="Spec to begin with; may be repeated.")] = None,
    host: Annotated[str, typer.Option(help=_HOST)] = _LOCAL,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free from 7860.")] = None,
    device: Annotated[str | None, typer.Option(help="Device; default: cuda where present, else cpu.")] = None,
    dtype: Dtype = None,
) -> None:
    """Choose policies in a browser: their plan and estimate, then pictures with and without them side by side."""
    from cachekit.tools.app.serving import serve

    server, address = serve(model, _specs(spec), host, port, device, dtype)
    say(f"open {address} (Ctrl-C stops it)")
    if host not in (_LOCAL, "localhost"):
        say("warning: everybody who reaches this address can load models and draw on this machine")
    server.block_thread()


def _specs(given: list[str] | None) -> list[str]:
    """Begin with the first spec of the demo, where its policy is installed."""
    from cachekit.registry.catalog import installed

    first = SPECS[0]
    return given or [first] * (first.partition(":")[0] in installed().policies)
