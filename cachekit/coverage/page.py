"""Write the results of a survey as a page of Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from cachekit.coverage.results import JOIN, STATES, Coverage, Result, Sites, Trial
from cachekit.interface.specs import split_specs

_INTRODUCTION = """\
# Coverage

Every pipeline class of diffusers that can be built small from its configuration alone, run uncached, under each policy,
and under compositions. `make coverage` writes this page; it installs a few packages that some pipelines need.

- **works**: the policy (of a composition, at least one) reuses something. Removing it restores the uncached output, and
  applying it again repeats the cached output, both to the bit.
- **refused**: a one-line error at `apply` or at the beginning of the run, which leaves the pipeline as it was.
- **idle**: accepted, but never reuses anything.
- **fails**: anything else.

The guidance branches are found by changing the prompts and comparing what the denoiser receives in the first step: `uc`
is one batch with the unconditional half first, and `c, u` are two calls. A `c` changes with the prompt, a `u` with the
negative prompt, a `b` with both and a `-` with neither. A policy that confuses the branches fails.
"""


_DENOISERS = """\
Sites that the adapters find in the small model that was built. An adapter recognises a denoiser by its own lists of
blocks that run one after the other, or by its paired down and up blocks; one with neither has no adapter.
"""


def markdown(coverage: Coverage) -> str:
    """Write the page: counts, pipelines with their policies, denoisers with their sites, and what was not built."""
    notes = _numbers(coverage)
    sections = [
        _INTRODUCTION,
        _versions(coverage),
        *_table(["policy", *STATES], [[f"`{spec}`", *map(str, _counts(coverage, spec))] for spec in coverage.specs]),
        "\n## Pipelines\n",
        *_table(
            ["pipeline", "branches", "denoisers", *_names(coverage)], [_row(trial, notes) for trial in coverage.built]
        ),
        "\n## Reasons\n",
        *(f"{number}. {_escaped(note)}" for note, number in notes.items()),
        "\n## Denoisers\n",
        _DENOISERS,
        *_table(["denoiser", "adapter", "sites", "regions", "chains", "pipelines"], _denoisers(coverage)),
        "\n## Not built\n",
        *_table(
            ["pipeline", "reason"], [[f"`{trial.pipeline}`", _escaped(trial.reason)] for trial in coverage.not_built]
        ),
    ]
    return "\n".join(sections) + "\n"


def summary(coverage: Coverage) -> Iterable[Sequence[str]]:
    """Make the rows of a table for the terminal: a pipeline and the state of each policy on it."""
    for trial in coverage.built:
        yield [trial.pipeline, *(trial.results[spec].state for spec in coverage.specs)]


def _versions(coverage: Coverage) -> str:
    built, names = len(coverage.built), ", ".join(f"{name} {number}" for name, number in coverage.versions.items())
    denoisers = coverage.denoisers
    unknown = [f"`{name}`" for name, sites in denoisers.items() if not sites.kinds]
    without = f": all but {', '.join(unknown)}" if unknown else ""
    return (
        f"{built} of {len(coverage.trials)} pipelines were built, with {len(denoisers)} denoiser classes. Sites are"
        f" found in {len(denoisers) - len(unknown)} of these{without} ({names}).\n"
    )


def _counts(coverage: Coverage, spec: str) -> list[int]:
    return list(coverage.counts(spec).values())


def _names(coverage: Coverage) -> list[str]:
    return [JOIN.join(one.partition(":")[0] for one in split_specs(spec)) for spec in coverage.specs]


def _row(trial: Trial, notes: dict[str, int]) -> list[str]:
    cells = [_cell(result, notes) for result in trial.results.values()]
    branches = f"`{trial.branches.replace('|', ', ')}`" if trial.branches else ""
    return [f"`{trial.pipeline}`", branches, ", ".join(f"`{name}`" for name in trial.sites), *cells]


def _cell(result: Result, notes: dict[str, int]) -> str:
    return f"{result.state} ({notes[result.note]})" if result.note else result.state


def _numbers(coverage: Coverage) -> dict[str, int]:
    """Assign numbers to notes, the most frequent first."""
    found = Counter(result.note for _, _, result in coverage.results(*STATES) if result.note)
    ordered = sorted(found, key=lambda note: (-found[note], note))
    return {note: number for number, note in enumerate(ordered, 1)}


def _denoisers(coverage: Coverage) -> list[list[str]]:
    users = Counter(name for trial in coverage.built for name in trial.sites)
    return [[f"`{name}`", *_described(sites), str(users[name])] for name, sites in coverage.denoisers.items()]


def _described(sites: Sites) -> list[str]:
    kinds = ", ".join(f"{kind} x {count}" for kind, count in sites.kinds.items())
    chains = " + ".join(map(str, sites.chains))
    return [sites.adapter, kinds or _escaped(sites.note), str(sites.regions or ""), chains]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows]]


def _escaped(text: str) -> str:
    """Escape the characters that Markdown tables and HTML treat specially."""
    return text.replace("|", "\\|").replace("<", "&lt;")
