"""Options shared by the commands of `cachekit bench` that generate images."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from cachekit.cli.models import Dtype
from cachekit.cli.output import JsonFile

if TYPE_CHECKING:
    from cachekit.interface.policy import Policy
    from cachekit.tools.bench.captions import Captions
    from cachekit.tools.bench.cells import Setting

__all__ = ["ImagingSettings"]

_SPEC = "Specs or a grid of them, such as 'tgate:m=5|10+deepcache:interval=2|3'; may be repeated."
_CAPTIONS = "File with one caption per line, MS-COCO annotations (.json), or a number of held-out captions."
_OWN_SIZE = "Pixels; default: the pipeline's own."


@dataclass(frozen=True, kw_only=True)
class ImagingSettings:
    """What is generated, and on which device."""

    spec: Annotated[list[str], typer.Option(help=_SPEC)] = field(default_factory=list)
    scheduler: Annotated[
        list[str], typer.Option(help="Scheduler of diffusers; default: the model's own. May be repeated.")
    ] = field(default_factory=list)
    steps: Annotated[list[int], typer.Option(min=1, help="Number of steps; may be repeated.")] = field(
        default_factory=lambda: [25]
    )
    seed: Annotated[list[int], typer.Option(help="Seed of the noise; may be repeated.")] = field(
        default_factory=lambda: [0]
    )
    captions: Annotated[str, typer.Option(help=_CAPTIONS)] = "8"
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first captions, this many.")] = None
    dtype: Dtype = None
    device: Annotated[str | None, typer.Option(help="Device; default: cuda where present, else cpu.")] = None
    compiled: Annotated[
        str | None, typer.Option("--compile", help="Compile the repeated blocks with this backend, such as inductor.")
    ] = None
    height: Annotated[int | None, typer.Option(min=8, help=_OWN_SIZE)] = None
    width: Annotated[int | None, typer.Option(min=8, help=_OWN_SIZE)] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the pipeline's own.")] = None
    metric: Annotated[
        list[str], typer.Option(metavar="NAME=PATH", help="Learned metric and its weights; may be repeated.")
    ] = field(default_factory=list)
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of each process.")] = None
    json: JsonFile = None

    def read_captions(self) -> Captions:
        """Read the captions, up to the limit."""
        from cachekit.tools.bench.captions import read_captions

        return read_captions(self.captions, self.limit)

    def parse_specs(self, default: Collection[str] = ()) -> list[tuple[Policy, ...]]:
        """Expand the grids of specs, or those in `default` where none are given."""
        from cachekit.registry.catalog import installed
        from cachekit.tools.bench.cells import expand

        return expand(self.spec or default, installed())

    def setting(self, model: str, metrics: Collection[str]) -> Setting:
        """Make the setting that a worker measures `model` with; `metrics` are the names of known metrics."""
        from cachekit.tools.bench.cells import Setting
        from cachekit.tools.bench.quality import parse_metrics

        return Setting(
            model=model,
            captions=self.read_captions().texts,
            metrics=parse_metrics(self.metric, metrics),
            dtype=self.dtype,
            device=self.device,
            compiled=self.compiled,
            height=self.height,
            width=self.width,
            guidance=self.guidance,
            threads=self.threads,
        )
