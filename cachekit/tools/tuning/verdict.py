"""The verdict: the best candidates and the plain steps that they must beat, on captions that the search never used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from cachekit.interface.presets import Figures, PlainSteps
from cachekit.tools.bench.cells import Cell
from cachekit.tools.bench.results import Result
from cachekit.tools.bench.spacing import absent
from cachekit.tools.bench.summary import Group, Row
from cachekit.tools.tuning.candidates import Candidate
from cachekit.tools.tuning.measuring import Measurer, figures_of
from cachekit.tools.tuning.study import Journal, Measured
from cachekit.tools.tuning.targets import Target, Targets, similarity_of

__all__ = ["Judged", "Verdict", "judge"]

#: Candidates that are judged at once, and how often.
_TOGETHER, _ROUNDS = 3, 2
#: Captions on which the spacing of plain steps is chosen.
_FEW = 8


@dataclass(frozen=True)
class Judged:
    """A candidate, its figures on fresh captions, and the best plain steps of equal cost beside it."""

    candidate: Candidate
    figures: Figures
    plain: PlainSteps | None = None


@dataclass(frozen=True)
class Verdict:
    """What was judged on fresh captions, and the best of it: None where no candidate serves the targets.

    `rival` are plain steps that reach the targets and are better than the best. `nearest` is a line about the
    candidates on each side of the targets where none reaches them.
    """

    judged: list[Judged]
    best: Judged | None
    rival: PlainSteps | None
    nearest: str


def judge(journal: Journal, measurer: Measurer, targets: Targets, captions: Sequence[str], pipeline: type) -> Verdict:
    """Measure the most promising candidates of a study, in a few rounds, until one reaches the targets."""
    left = _promising(journal, targets)
    judged: list[Judged] = []
    for _ in range(_ROUNDS):
        lot, left = left[:_TOGETHER], left[_TOGETHER:]
        if lot:
            judged += _on_fresh(lot, measurer, targets, captions, pipeline)
        reaching = [one for one in judged if targets.serves(one.figures)]
        cached = [one for one in reaching if one.candidate.specs]
        if cached or not left:
            break
    best = max(cached, key=lambda one: targets.merit(one.figures), default=None)
    return Verdict(judged, best, _rival(reaching, best, targets), _missed(journal, judged, reaching, targets))


def _rival(reaching: Sequence[Judged], best: Judged | None, targets: Targets) -> PlainSteps | None:
    """Best plain steps that reach the targets, those beside the best candidate included; None where that beats them."""
    plain = [
        PlainSteps(steps=one.candidate.steps, spacing=one.candidate.spacing, figures=one.figures)
        for one in reaching
        if not one.candidate.specs
    ]
    plain += [one.plain for one in reaching if one.plain and targets.serves(one.plain.figures)]
    rival = max(plain, key=lambda one: targets.merit(one.figures), default=None)
    if rival and best and targets.merit(rival.figures) <= targets.merit(best.figures):
        return None
    return rival


def _missed(journal: Journal, judged: Sequence[Judged], reaching: Sequence[Judged], targets: Targets) -> str:
    return "" if reaching else nearest(journal.measured, judged, targets)


def _promising(journal: Journal, targets: Targets) -> list[Candidate]:
    """List the candidates that serve the targets in the search, the best first, of plain ones the best alone.

    Those that cost less, but show one caption too few, take turns with them: on other captions they may serve.
    """
    serving = _ranked([one for one in journal.measured if targets.serves(one.figures)], targets)
    plain = [one.candidate for one in serving if not one.candidate.specs][:1]
    cached = [one for one in serving if one.candidate.specs]
    least = targets.merit(cached[0].figures) if cached else (0.0, 0.0)
    close = [one for one in journal.measured if one.candidate.specs and one not in cached]
    close = [one for one in close if targets.nearly_serves(one.figures) and targets.merit(one.figures) > least]
    pairs = zip_longest(_ranked(close, targets), cached)
    turns = [one.candidate for pair in pairs for one in pair if one is not None]
    return [*turns[: _TOGETHER - len(plain)], *plain, *turns[_TOGETHER - len(plain) :]]


def _ranked(measured: Sequence[Measured], targets: Targets) -> list[Measured]:
    """Sort by merit; those that survived the first few images come first."""
    most = max((one.figures.images for one in measured), default=0)
    return sorted(measured, key=lambda one: (one.figures.images == most, targets.merit(one.figures)), reverse=True)


def _on_fresh(
    candidates: Sequence[Candidate], measurer: Measurer, targets: Targets, captions: Sequence[str], pipeline: type
) -> list[Judged]:
    """Measure candidates, and the best plain steps that cost as much as those that reach the targets."""
    outcomes = measurer.measure(candidates, captions)
    found = {place: one for place, one in enumerate(outcomes) if isinstance(one, Result)}
    figures = {place: figures_of([result]) for place, result in found.items()}
    rows = {
        place: Row(result.cell, [result])
        for place, result in found.items()
        if candidates[place].specs and targets.reached(figures[place])
    }
    plain: dict[int, PlainSteps | None] = {}
    if rows:
        cost = "wall time" if targets.by_time else "MACs"
        steps = {place: row.plain_steps()[cost] for place, row in rows.items()}
        cells = Group([*rows.values()]).baselines()
        rivals = [cell for cell in cells if cell.steps in steps.values() and not absent(cell, pipeline)]
        best = _best_plain(rivals, measurer, targets, captions)
        plain = {place: best.get(number) for place, number in steps.items()}
    return [Judged(candidates[place], figures[place], plain.get(place)) for place in found]


def _best_plain(
    cells: Sequence[Cell], measurer: Measurer, targets: Targets, captions: Sequence[str]
) -> dict[int, PlainSteps]:
    """Measure plain steps: with each spacing on a few captions, and with the best for each number on the others."""
    few = _results(cells, measurer, captions[:_FEW])
    best = _by_number({cell: figures_of([one]) for cell, one in few.items()}, targets)
    more = _results([*best.values()], measurer, captions[_FEW:], _FEW) if captions[_FEW:] else {}
    found = {steps: [results[cell] for results in (few, more) if cell in results] for steps, cell in best.items()}
    return {
        steps: PlainSteps(steps=steps, spacing=cell.spacing, figures=figures_of(found[steps]))
        for steps, cell in best.items()
    }


def _results(cells: Sequence[Cell], measurer: Measurer, captions: Sequence[str], place: int = 0) -> dict[Cell, Result]:
    outcomes = zip(cells, measurer.measure_cells(cells, captions, place))
    return {cell: outcome for cell, outcome in outcomes if isinstance(outcome, Result)}


def _by_number(figures: dict[Cell, Figures], targets: Targets) -> dict[int, Cell]:
    """Choose the best of each number of steps: by captions where they are asked for, then by similarity."""

    def worth(cell: Cell) -> tuple[float, float]:
        match = figures[cell].caption_match if targets.caption_match is not None else None
        return match or 0.0, similarity_of(figures[cell])

    return {cell.steps: cell for cell in sorted(figures, key=worth)}


# -- what comes near --------------------------------------------------------------------------------------


def nearest(measured: Sequence[Measured], judged: Sequence[Judged], targets: Targets) -> str:
    """Describe, for each target, the nearest candidates that miss and that reach it, in one line."""
    fresh = {one.candidate: one.figures for one in judged}
    figures = {one.candidate: fresh.get(one.candidate, one.figures) for one in measured}
    return "; ".join(_sides(target, figures) for target in targets.listed)


def _sides(target: Target, figures: dict[Candidate, Figures]) -> str:
    short = {candidate: one for candidate, one in figures.items() if not target.reached(one)}
    there = {candidate: one for candidate, one in figures.items() if target.reached(one)}
    below = min(short, key=lambda one: abs(target.shortfall(short[one])), default=None)
    above = min(there, key=lambda one: abs(target.shortfall(there[one])), default=None)
    sides = [
        f"{name} it {_described(target, one, figures[one])}" if one else f"nothing {word} it"
        for name, word, one in (("nearest short of", "falls short of", below), ("nearest beyond", "reaches", above))
    ]
    return f"{target.text}: {', '.join(sides)}"


def _described(target: Target, candidate: Candidate, figures: Figures) -> str:
    value, similar = target.value(figures), similarity_of(figures)
    shown = target.shown.format(value) if math.isfinite(value) else "identical"
    quality = f"{similar:.1f} dB" if math.isfinite(similar) else "identical"
    beside = "" if "dB" in target.shown else f", {quality}"
    steps = f" in {candidate.steps} steps" if candidate.specs else ""
    return f"{candidate.label}{steps} ({shown}{beside}, {figures.mac_reduction or 0:.2f}x MACs)"
