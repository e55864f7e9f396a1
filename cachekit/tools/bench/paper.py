"""The papers' tables: costs counted from architectures alone, and for each FID the command that measures it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from cachekit.costs.estimate import estimate
from cachekit.models.architectures import architecture

__all__ = ["Measurable", "Rebuilt", "measurable", "rebuilt", "tables"]

_CAPTIONS, _REFERENCES, _INCEPTION = "captions_val2014.json", "val2014", "inception-2015-12-05.pt"


@dataclass(frozen=True)
class Rebuilt:
    """A published cost and the counted one, in 10^12 MACs, and parameters of the final phase."""

    table: str
    name: str
    paper: float
    ours: float
    paper_params: float | None = None
    params: int | None = None

    @property
    def ratio(self) -> float:
        """The counted cost over the published one."""
        return self.ours / self.paper


@dataclass(frozen=True)
class Measurable:
    """A published FID, and the commands that measure it where the data set and the weights are available."""

    table: str
    name: str
    paper: float
    commands: tuple[str, ...]


@cache
def tables() -> dict[str, Any]:
    """Load the published figures."""
    data: dict[str, Any] = json.loads(resources.files("cachekit.tools.bench").joinpath("paper_tables.json").read_text())
    return data


def rebuilt(models: Collection[str] = ()) -> Iterator[Rebuilt]:
    """Count each published cost, of all models or of those named."""
    for row in _of(models, (*tables()["rows"], *tables()["cair"])):
        found = estimate(row["model"], row["specs"], num_inference_steps=row["steps"])
        params = {} if row["params_M"] is None else {"paper_params": row["params_M"], "params": found.params}
        yield Rebuilt(str(row["table"]), _name(row), row["macs_T"], found.macs / 1e12, **params)
    for row in _of(models, tables()["scaling"]):
        yield Rebuilt(str(row["table"]), _scaling_name(row), row["macs_T"], _scaling_macs(row) / 1e12)


def measurable(models: Collection[str] = ()) -> Iterator[Measurable]:
    """Find each published FID and its commands, of all models or of those named."""
    for row in _of(models, (*tables()["quality"], *tables()["rows"], *tables()["cair"])):
        yield Measurable(str(row["table"]), _name(row), row["fid"], _commands(row))


def _of(models: Collection[str], rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (row for row in rows if not models or row["model"] in models)


def _name(row: dict[str, Any]) -> str:
    scheduler = f"{row['scheduler']}, " if "scheduler" in row else ""
    return f"{row['model']}, {scheduler}{row['steps']} steps, {_composition(row)}"


def _composition(row: dict[str, Any]) -> str:
    return " + ".join(row["specs"]) or "plain"


def _scaling_name(row: dict[str, Any]) -> str:
    return (
        f"{row['model']}, {row['height']} px, {row['token_factor']} x text, one step of one branch, {_composition(row)}"
    )


def _scaling_macs(row: dict[str, Any]) -> int:
    """MACs of one step of one branch at a row's image size and number of text tokens (table 10)."""
    known = architecture(row["model"])
    wider = replace(known, tokens=known.tokens * row["token_factor"])
    inputs = wider.inputs(1, row["height"], row["width"])
    return estimate(known.build(), row["specs"], num_inference_steps=2, inputs=inputs, guided=False).steps[-1].macs


def _commands(row: dict[str, Any]) -> tuple[str, ...]:
    """Command that scores a row's images, after the one that prepares its model where that is needed."""
    how = tables()["reproduction"]
    model = how["models"][row["model"]]
    options = {
        "captions": _CAPTIONS,
        "references": _REFERENCES,
        "limit": how["captions"],
        "metric": f"fid={_INCEPTION}",
        "scheduler": row.get("scheduler", model.get("scheduler")),
        "steps": row["steps"],
        "guidance": model.get("guidance"),
        "dtype": "float16",
        "spec": "+".join(row["specs"]) or None,
    }
    words = (word for name, value in options.items() if value is not None for word in (f"--{name}", str(value)))
    command = shlex.join(["cachekit", "bench", "coco", model["model"], *words])
    return (*([model["prepare"]] if "prepare" in model else []), command)
