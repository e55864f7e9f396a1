"""Write the results of a survey as a page of Markdown."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from cachekit.interface.specs import split_specs
from cachekit.tools.coverage.results import JOIN, LEFT_OUT, STATES, WORKS, Coverage, Result, Sites, Trial

_INTRODUCTION = """\
# Coverage

Every pipeline class of diffusers that can be built small from its configuration alone, run uncached, under each policy,
and under compositions. `make coverage` writes this page; it installs a few packages that some pipelines need.

- **works**: the policy (of a composition, at least one) reuses something. Removing it restores the uncached output, and
  applying it again repeats the cached output, both to the bit.
- **refused**: a one-line error at `apply` or at the beginning of the run, which leaves the pipeline as it was.
- **idle**: accepted, but never reuses anything.
- **fails**: anything else.

Messages are those of the pipelines, without the spec that they begin with.
The guidance branches are found by changing the prompts and comparing what the denoiser receives in the first step: `uc`
is one batch with the unconditional half first, and `c, u` are two calls. A `c` changes with the prompt, a `u` with the
negative prompt, a `b` with both and a `-` with neither. A policy that confuses the branches fails.

Thresholds are so high that a policy reuses what it can. One that lacks figures of the model gets those that an uncached
run of the same pipeline shows.
"""


_DENOISERS = """\
Sites that the adapters find in the small model that was built. An adapter recognises a denoiser by its own lists of
blocks that run one after the other, or by its paired down and up blocks; one with neither has no adapter.
"""


def markdown(coverage: Coverage) -> str:
    """Write the page: counts, pipelines with their policies, denoisers with their sites, and what was not built."""
    sections = [
        _INTRODUCTION,
        *(f"Left out: `{name}`, {reason}.\n" for name, reason in LEFT_OUT.items()),
        _versions(coverage),
        *_table(["policy", *STATES], [[f"`{spec}`", *map(str, _counts(coverage, spec))] for spec in coverage.specs]),
        "\n## Pipelines\n",
        *_table(
            ["pipeline", "branches", "denoisers", "works", "does not, and why"],
            [_row(trial) for trial in coverage.built],
        ),
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


def _name(spec: str) -> str:
    return JOIN.join(one.partition(":")[0] for one in split_specs(spec))


def _row(trial: Trial) -> list[str]:
    branches = f"`{trial.branches.replace('|', ', ')}`" if trial.branches else ""
    denoisers = ", ".join(f"`{name}`" for name in trial.sites)
    works = {spec: result for spec, result in trial.results.items() if result.state == WORKS}
    others = {spec: result for spec, result in trial.results.items() if result.state != WORKS}
    return [f"`{trial.pipeline}`", branches, denoisers, _grouped(works), _grouped(others)]


def _grouped(results: dict[str, Result]) -> str:
    """Write results as a line for each state and message, with the specs that have it."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for spec, result in results.items():
        groups[result.state, _message(spec, result.note)].append(f"`{_name(spec)}`")
    lines = []
    for (state, message), names in groups.items():
        title = ", ".join(names) if state == WORKS else f"{state}: {', '.join(names)}"
        lines.append(f"{title}: {_escaped(message)}" if message else title)
    return "<br>".join(lines)


def _message(spec: str, note: str) -> str:
    """Leave out the spec that a message begins with, so that specs refused for one reason share a line."""
    return next((note.removeprefix(f"{one}: ") for one in split_specs(spec) if note.startswith(f"{one}: ")), note)


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
