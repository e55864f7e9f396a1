"""Write what a survey found as a page of markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from cachekit.coverage.results import Coverage
from cachekit.coverage.trial import JOIN, STATES, Result, Sites, Trial

_INTRODUCTION = """\
# Coverage

Every pipeline class of diffusers that can be built small from configuration alone, run uncached, with each policy, and
with compositions. `make coverage` writes this page, with a few packages that some pipelines need.

- **works**: the policy acts, or of a composition at least one, the output is what it was once it is removed, and the
  same again once it is applied again, both to the bit.
- **refused**: an error in one line, at `apply` or at the beginning of the run, and the pipeline is as it was.
- **idle**: accepted, and then never acts.
- **fails**: anything else.

The branches are those of the first step's calls, seen from outside by changing the prompts: `uc` is one batch with the
unconditional half first, `c, u` are two calls; `c` changes with the prompt, `u` with the negative prompt, `b` with both
and `-` with neither. A policy that takes one for the other fails.
"""


_DENOISERS = """\
Sites that the adapters name, in the small model that was built. A denoiser is known by lists of blocks of its own that
run one after the other, or by paired down and up blocks; one that has neither has no adapter.
"""


def markdown(coverage: Coverage) -> str:
    """Return the page: counts, pipelines with their policies, denoisers with their sites, and what was not built."""
    notes = _numbers(coverage)
    parts = [
        _INTRODUCTION,
        _versions(coverage),
        *_table(["policy", *STATES], [[f"`{spec}`", *map(str, _counts(coverage, spec))] for spec in coverage.specs]),
        "\n## Pipelines\n",
        *_table(
            ["pipeline", "branches", "denoisers", *_names(coverage)], [_row(trial, notes) for trial in coverage.built]
        ),
        "\n## Reasons\n",
        *(f"{number}. {_plain(note)}" for note, number in notes.items()),
        "\n## Denoisers\n",
        _DENOISERS,
        *_table(["denoiser", "adapter", "sites", "regions", "chains", "pipelines"], _denoisers(coverage)),
        "\n## Not built\n",
        *_table(
            ["pipeline", "reason"], [[f"`{trial.pipeline}`", _plain(trial.reason)] for trial in coverage.not_built]
        ),
    ]
    return "\n".join(parts) + "\n"


def summary(coverage: Coverage) -> Iterable[Sequence[str]]:
    """Yield a row of the terminal's table for each pipeline: its name and each policy's state."""
    for trial in coverage.built:
        yield [trial.pipeline, *(trial.results[spec].state for spec in coverage.specs)]


def _versions(coverage: Coverage) -> str:
    built, names = len(coverage.built), ", ".join(f"{name} {number}" for name, number in coverage.versions.items())
    denoisers = coverage.denoisers
    unknown = [f"`{name}`" for name, sites in denoisers.items() if not sites.kinds]
    without = f": all but {', '.join(unknown)}" if unknown else ""
    return (
        f"{built} of {len(coverage.trials)} pipelines were built, with {len(denoisers)} denoiser classes. Sites are"
        f" named in {len(denoisers) - len(unknown)} of these{without} ({names}).\n"
    )


def _counts(coverage: Coverage, spec: str) -> list[int]:
    return list(coverage.counts(spec).values())


def _names(coverage: Coverage) -> list[str]:
    return [JOIN.join(one.partition(":")[0] for one in spec.split(JOIN)) for spec in coverage.specs]


def _row(trial: Trial, notes: dict[str, int]) -> list[str]:
    cells = [_cell(result, notes) for result in trial.results.values()]
    branches = f"`{trial.branches.replace('|', ', ')}`" if trial.branches else ""
    return [f"`{trial.pipeline}`", branches, ", ".join(f"`{name}`" for name in trial.sites), *cells]


def _cell(result: Result, notes: dict[str, int]) -> str:
    return f"{result.state} ({notes[result.note]})" if result.note else result.state


def _numbers(coverage: Coverage) -> dict[str, int]:
    """Return a number for each reason, the most frequent first."""
    found = Counter(result.note for _, _, result in coverage.results(*STATES) if result.note)
    ordered = sorted(found, key=lambda note: (-found[note], note))
    return {note: number for number, note in enumerate(ordered, 1)}


def _denoisers(coverage: Coverage) -> list[list[str]]:
    users = Counter(name for trial in coverage.built for name in trial.sites)
    return [[f"`{name}`", *_described(sites), str(users[name])] for name, sites in coverage.denoisers.items()]


def _described(sites: Sites) -> list[str]:
    kinds = ", ".join(f"{kind} x {count}" for kind, count in sites.kinds.items())
    chains = " + ".join(map(str, sites.chains))
    return [sites.adapter, kinds or _plain(sites.note), str(sites.regions or ""), chains]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]


def _plain(text: str) -> str:
    """Return text that a table and a list take as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;")
