"""Results of a survey, as data that can be written, read and counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cachekit.errors import CachekitError

WORKS, REFUSED, IDLE, FAILS = "works", "refused", "idle", "fails"
STATES = (WORKS, REFUSED, IDLE, FAILS)
#: Policies that aren't tried, with the reason.
LEFT_OUT = {"calibrated": "whose weights are fitted to many images of one model, scheduler and number of steps"}
#: Joins the specs of a composition.
JOIN = "+"

_LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass
class Result:
    """State of one policy on one pipeline, with a line of explanation."""

    state: str
    note: str = ""


@dataclass
class Sites:
    """What an adapter finds in one denoiser class: sites by kind, nested regions, and lengths of chains of blocks."""

    adapter: str
    kinds: dict[str, int]
    regions: int = 0
    chains: list[int] = field(default_factory=list)
    #: Why no adapter takes the class.
    note: str = ""


@dataclass
class Trial:
    """Results of one pipeline class."""

    pipeline: str
    #: Why it wasn't built, or "".
    reason: str = ""
    results: dict[str, Result] = field(default_factory=dict)
    #: By class of the denoiser.
    sites: dict[str, Sites] = field(default_factory=dict)
    #: Guidance branches of a step's calls, as `branches_of` writes them.
    branches: str = ""

    @property
    def built(self) -> bool:
        """Whether the pipeline was built and returned the same finite output twice."""
        return not self.reason

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Trial:
        """Rebuild a trial from `as_dict`."""
        results = {spec: Result(**result) for spec, result in data["results"].items()}
        sites = {name: Sites(**found) for name, found in data["sites"].items()}
        return cls(data["pipeline"], data["reason"], results, sites, data["branches"])


@dataclass
class Coverage:
    """Trials of all pipelines under the same specs, with the versions of the libraries."""

    specs: list[str]
    trials: list[Trial]
    versions: dict[str, str] = field(default_factory=lambda: {name: _release(name) for name in _LIBRARIES})

    @property
    def built(self) -> list[Trial]:
        """Trials of pipelines that were built, by name."""
        return sorted((trial for trial in self.trials if trial.built), key=lambda trial: trial.pipeline)

    @property
    def not_built(self) -> list[Trial]:
        """Trials of pipelines that were not built, by name."""
        return sorted((trial for trial in self.trials if not trial.built), key=lambda trial: trial.pipeline)

    def counts(self, spec: str) -> dict[str, int]:
        """Count the pipelines in each state under a spec."""
        found = Counter(trial.results[spec].state for trial in self.built)
        return {state: found[state] for state in STATES}

    @property
    def denoisers(self) -> dict[str, Sites]:
        """Sites of each denoiser class, in the small model of the first pipeline that has it."""
        found = {name: sites for trial in reversed(self.built) for name, sites in trial.sites.items()}
        return {name: found[name] for name in sorted(found)}

    def results(self, *states: str) -> Iterator[tuple[Trial, str, Result]]:
        """Find the results in one of these states, each with its trial and spec."""
        for trial in self.built:
            for spec, result in trial.results.items():
                if result.state in states:
                    yield trial, spec, result

    def updating(self, older: Coverage) -> Coverage:
        """Add the older trials of all other pipelines.

        Raises `CachekitError` where specs or versions of libraries differ, so that the trials can't be compared.
        """
        if (older.specs, older.versions) != (self.specs, self.versions):
            raise CachekitError(
                f"the older results are of {', '.join(older.specs)} with {older.versions}: try all pipelines, or"
                " write to another file"
            )
        new = {trial.pipeline for trial in self.trials}
        return Coverage(self.specs, [*self.trials, *(trial for trial in older.trials if trial.pipeline not in new)])

    def to_json(self) -> str:
        """Write JSON with a line per pipeline, so that a diff shows which ones changed."""
        trials = sorted(self.trials, key=lambda trial: trial.pipeline)
        lines = ",\n".join(f"  {json.dumps(trial.as_dict())}" for trial in trials)
        head = f' "specs": {json.dumps(self.specs)},\n "versions": {json.dumps(self.versions)}'
        return f'{{\n{head},\n "trials": [\n{lines}\n ]\n}}\n'


def read(path: Path) -> Coverage:
    """Read the JSON of a survey.

    Raises `CachekitError` for a file that can't be read or holds something else.
    """
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        return Coverage(data["specs"], [Trial.from_dict(trial) for trial in data["trials"]], data["versions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CachekitError(
            f"cannot read coverage {str(path)!r}: {error}; write it with cachekit coverage --json"
        ) from error


def _release(name: str) -> str:
    """Find a library's version, without the local suffix of its build."""
    return version(name).partition("+")[0]
