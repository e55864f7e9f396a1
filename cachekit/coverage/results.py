"""Hold what a survey found, as data that can be written, read and counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cachekit.coverage.trial import STATES, Result, Sites, Trial
from cachekit.errors import CachekitError

_LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass
class Coverage:
    """Hold the trials of all pipelines under some specs, and the versions of the libraries."""

    specs: list[str]
    trials: list[Trial]
    versions: dict[str, str] = field(default_factory=lambda: {name: _release(name) for name in _LIBRARIES})

    @property
    def built(self) -> list[Trial]:
        """Return the trials of pipelines that were built, by name."""
        return sorted((trial for trial in self.trials if trial.built), key=lambda trial: trial.pipeline)

    @property
    def not_built(self) -> list[Trial]:
        """Return the trials of pipelines that were not built, by name."""
        return sorted((trial for trial in self.trials if not trial.built), key=lambda trial: trial.pipeline)

    def counts(self, spec: str) -> dict[str, int]:
        """Return how many pipelines are in each state under a spec."""
        found = Counter(trial.results[spec].state for trial in self.built)
        return {state: found[state] for state in STATES}

    @property
    def denoisers(self) -> dict[str, Sites]:
        """Return what the adapters name in each denoiser class, in the small model of its first pipeline."""
        found = {name: sites for trial in reversed(self.built) for name, sites in trial.sites.items()}
        return {name: found[name] for name in sorted(found)}

    def results(self, *states: str) -> Iterable[tuple[Trial, str, Result]]:
        """Yield pipeline, spec and result of those in one of these states."""
        for trial in self.built:
            for spec, result in trial.results.items():
                if result.state in states:
                    yield trial, spec, result

    def taking_over(self, older: Coverage) -> Coverage:
        """Return this with the older trials of all other pipelines; raise `CachekitError` where they do not compare."""
        if (older.specs, older.versions) != (self.specs, self.versions):
            raise CachekitError(
                f"the older results are of {', '.join(older.specs)} with {older.versions}: try all pipelines, or"
                " write to another file"
            )
        known = {trial.pipeline for trial in self.trials}
        return Coverage(self.specs, [*self.trials, *(trial for trial in older.trials if trial.pipeline not in known)])

    def as_text(self) -> str:
        """Return it as JSON with a line for each pipeline, so that a change shows where it is."""
        trials = sorted(self.trials, key=lambda trial: trial.pipeline)
        lines = ",\n".join(f"  {json.dumps(trial.as_dict())}" for trial in trials)
        head = f' "specs": {json.dumps(self.specs)},\n "versions": {json.dumps(self.versions)}'
        return f'{{\n{head},\n "trials": [\n{lines}\n ]\n}}\n'


def read(path: Path) -> Coverage:
    """Return what was written; raise `CachekitError` for a file that is none of these."""
    try:
        data: dict[str, Any] = json.loads(path.read_text())
        return Coverage(data["specs"], [Trial.from_dict(trial) for trial in data["trials"]], data["versions"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CachekitError(f"cannot read coverage {str(path)!r}: {error}") from error


def _release(name: str) -> str:
    """Return a version without what only says how it was built."""
    return version(name).partition("+")[0]
