"""The parts of an analysis: what each computes, and the tables and pictures that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cachekit.applying import apply, sites
from cachekit.errors import first_line
from cachekit.models.architectures import guided_by_default
from cachekit.models.loading import scheduler_for
from cachekit.models.names import ModelError
from cachekit.registry.notices import silent_log
from cachekit.tools.analysis.changes import Changes, Notes, curves
from cachekit.tools.analysis.charts import Curve, chart
from cachekit.tools.analysis.comparing import (
    GATED,
    LENGTHS,
    SCHEDULERS,
    cell_of,
    compared,
    first,
    gates,
    last,
    orders,
    verdicts,
)
from cachekit.tools.analysis.noise import AFTER, BEFORE, HEADER, TITLE, WHOLE, mean_noise, order, rows
from cachekit.tools.bench.cells import BenchError, Setting
from cachekit.tools.bench.demo import to_json
from cachekit.tools.bench.grid import picture_grid
from cachekit.tools.bench.measuring import timed_call
from cachekit.tools.bench.subjects import Subject
from cachekit.tools.bench.summary import Group
from cachekit.tools.bench.tables import CONFIGURATION, headings, texts, title
from cachekit.tools.bench.workbench import Workbench
from cachekit.upstream.calling import STEPS

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PARTS", "Analysis", "Found", "Table"]

#: The figures of the tables of images.
_FIGURES = ("mac_reduction", "psnr", "ssim", "caption_match", "frechet")
_ORDER = "papers' order"
_UNGUIDED = "without guidance there is no branch without text, so runs with text in a part of the steps are left out"


@dataclass(frozen=True)
class Table:
    """A table: its title, the names of its columns, and its rows."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Found:
    """What one part has found: plain data, tables, pictures by file name (SVG or an image), and notes."""

    data: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    pictures: dict[str, str | Image] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Analysis:
    """Runs the parts on one loaded pipeline.

    `schedulers` are those that are compared; by default the papers', as far as the pipeline takes them. `ran` is
    called after each image with the number of images of the part so far, and of all.
    """

    def __init__(
        self,
        setting: Setting,
        subject: Subject,
        steps: int,
        seed: int,
        schedulers: Sequence[str] = (),
        ran: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Analyze the model of `setting`, whose pipeline is that of `subject`."""
        self._setting = setting
        self._pipe, self._arguments = subject.pipe, subject.arguments
        self._subject = subject
        self._steps, self._seed = steps, seed
        self._schedulers = schedulers
        self._is_guided = guided_by_default(self._pipe, setting.guidance)
        self._ran = ran
        self._done = self._total = 0

    def run(self, part: str) -> Found:
        """Run one of `PARTS`."""
        return PARTS[part](self)

    # -- single figures -----------------------------------------------------------------------------------

    def changes(self) -> Found:
        """Record the changes of outputs from step to step in uncached runs (figure 2)."""
        self._begin(len(self._setting.captions))
        notes = Notes()
        policy = Changes.noting(sites(self._pipe).values(), notes)
        with silent_log(), apply(self._pipe, policy):
            for prompt, seed in self._prompts():
                timed_call(self._pipe, {STEPS: self._steps, **self._arguments(prompt)}, seed)
                notes.read()
                self._count()
        found = curves(notes)
        pictures: dict[str, str | Image] = {"changes.svg": changes_chart(found)}
        for kind, curve in found.items():
            if curve["sites"] > 1:
                pictures[f"changes-{kind}.svg"] = _by_site(kind, curve)
        return Found(found, [_change_table(found)], pictures)

    def noise(self) -> Found:
        """Compute the mean of the predicted noise with text throughout, before and from a gate on (figure 3)."""
        gate = gates(self._steps)[-1:] if self._is_guided else []
        named: dict[str, list[str]] = {WHOLE: []}
        for step in gate:
            named |= {BEFORE.format(step): [first(step)], AFTER.format(step): [last(step)]}
        prompts = list(self._prompts())
        self._begin(len(named) * len(prompts))
        found = {}
        with silent_log():
            for name, specs in named.items():
                found[name] = mean_noise(self._pipe, self._arguments, specs, self._steps, prompts, self._count)
        tables = [Table(TITLE, HEADER, rows(found, step)) for step in gates(self._steps)[-1:]]
        pictures: dict[str, str | Image] = {"noise.svg": noise_chart(found)}
        notes = [order(found, step) for step in gate] if self._is_guided else [f"noise: {_UNGUIDED}"]
        return Found(dict(found), tables, pictures, notes)

    # -- images beside the uncached pipeline --------------------------------------------------------------

    def text(self) -> Found:
        """Compare images with the text in a part of the steps (table 1, figure 3)."""
        specs = [spec for gate in gates(self._steps) for spec in self._both(gate)]
        return self._compared("text", [("", self._steps, specs)])

    def lengths(self) -> Found:
        """Compare images with the text in a part of the steps, for runs of several lengths (table 2)."""
        return self._compared("lengths", [("", steps, self._both(gate)) for steps, gate in LENGTHS.items()])

    def schedulers(self) -> Found:
        """Compare TGATE and images with the text in a part of the steps for several schedulers (tables 3 and 8)."""
        gate = gates(self._steps)[-1:]
        specs = [spec for step in gate for spec in (f"{GATED}{step}", *self._both(step))]
        return self._compared("schedulers", [(name, self._steps, specs) for name in self._usable_schedulers()])

    def _compared(self, part: str, trials: Sequence[tuple[str, int, list[str]]]) -> Found:
        images = len(self._setting.captions)
        left_out = [] if all(specs for *_, specs in trials) else [f"{part}: {_UNGUIDED}"]
        trials = [trial for trial in trials if trial[-1]]
        self._begin(sum((1 + len(specs)) * (1 + images) for _, _, specs in trials))
        bench = Workbench(self._setting, self._subject, self._count)
        own = cell_of(self._setting, self._steps, self._seed)
        groups = []
        for scheduler, steps, specs in trials:
            name = type(scheduler_for(self._pipe, scheduler)).__name__ if scheduler else own.scheduler
            cell = own.model_copy(update={"scheduler": name, "steps": steps, "uncached_steps": steps})
            try:
                groups.append(compared(bench, cell, specs))
            except BenchError as error:
                left_out.append(str(error))
            except ValueError as error:  # the pipeline's own, as where its scheduler takes fewer steps
                left_out.append(f"{name}, {steps} steps, is left out: {first_line(error)}")
        self._ran(self._total, self._total)  # what is left out doesn't run
        return _images(part, groups, left_out)

    def _usable_schedulers(self) -> list[str]:
        """List the schedulers that are compared; of the papers' those that the pipeline takes, or its own.

        A model that has no guidance by default is distilled, for its own scheduler.
        """
        if self._schedulers:
            return list(self._schedulers)
        papers = SCHEDULERS if guided_by_default(self._pipe) else ()
        found = [name for name in papers if _takes(self._pipe, name)]
        return found or [type(self._pipe.scheduler).__name__]

    def _both(self, gate: int) -> list[str]:
        """Make the specs of S^F and S^L; none for a model without guidance."""
        return [first(gate), last(gate)] if self._is_guided else []

    # -- progress -----------------------------------------------------------------------------------------

    def _prompts(self) -> Iterator[tuple[str, int]]:
        """Yield each caption with the seed of its noise."""
        return ((caption, self._seed + place) for place, caption in enumerate(self._setting.captions))

    def _begin(self, total: int) -> None:
        self._done, self._total = 0, total
        self._ran(0, total)

    def _count(self) -> None:
        self._done += 1
        self._ran(min(self._done, self._total), self._total)


#: The parts, in the order in which they run.
PARTS: Mapping[str, Callable[[Analysis], Found]] = {
    "changes": Analysis.changes,
    "noise": Analysis.noise,
    "text": Analysis.text,
    "lengths": Analysis.lengths,
    "schedulers": Analysis.schedulers,
}


def _takes(pipe: Any, scheduler: str) -> bool:
    try:
        scheduler_for(pipe, scheduler)
    except ModelError:
        return False
    return True


def _images(part: str, groups: Sequence[Group], left_out: Sequence[str]) -> Found:
    """Show groups of images: a table and a picture of each, and whether the papers' order holds."""
    found = [orders(group) for group in groups]
    data = {"groups": [to_json(group) for group in groups], "orders": [order for one in found for order in one]}
    shown = Found(data, notes=list(left_out))
    for group, own in zip(groups, found):
        shown.tables.append(_table(group, verdicts(own)))
        shown.pictures[f"{part}-{group.cell.scheduler}-{group.cell.steps}.png"] = picture_grid(group)
        shown.notes += [*group.left_out, *(f"warning: {warning}" for warning in group.warnings)]
    return shown


def _table(group: Group, said: Mapping[str, str]) -> Table:
    """Tabulate images, with what is said of their order by spec."""
    names, rows = [CONFIGURATION, *headings(_FIGURES)], []
    for row in (group.uncached, *group.rows):
        cells = texts(group, row)
        rows.append([*(cells[name] for name in names), said.get("".join(row.cell.specs), "")])
    return Table(title(group), [*names, _ORDER], rows)


def noise_chart(found: Mapping[str, Any]) -> str:
    """Draw the mean of the predicted noise over the steps, a line for each of the ways in which the text is given."""
    shown = {name: Curve(range(len(one["mean"])), one["mean"], one["spread"]) for name, one in found.items()}
    return chart("Mean of the predicted noise", "mean", shown)


def changes_chart(found: Mapping[str, Any]) -> str:
    """Draw the relative change of outputs between steps, a line for each kind."""
    shown = {f"{kind} x {curve['sites']}": _curve(curve) for kind, curve in found.items()}
    return chart("Change of outputs from step to step", "relative L2", shown)


def _by_site(kind: str, curve: Mapping[str, Any]) -> str:
    shown = {site: _curve(one) for site, one in curve["by_site"].items()}
    return chart(f"Change of {kind} from step to step", "relative L2", shown)


def _curve(curve: Mapping[str, Any]) -> Curve:
    """Take the steps in which the relative change is known."""
    relative = curve["relative"]
    known = [row for row in zip(curve["steps"], relative["mean"], relative["spread"]) if row[1] is not None]
    steps, mean, spread = zip(*known) if known else ((0,), (0.0,), (0.0,))
    return Curve(steps, mean, spread)


def _change_table(found: Mapping[str, Any]) -> Table:
    """Tabulate the relative changes of the first, the middle and the last steps."""
    rows = []
    for kind, curve in found.items():
        shown = _curve(curve)
        places = (0, len(shown.steps) // 2, -1)
        cells = [f"{shown.mean[place]:.3f} +- {shown.spread[place]:.3f}" for place in places]
        rows.append([kind, str(curve["sites"]), *cells, str(shown.steps[shown.mean.index(max(shown.mean))])])
    header = ["kind", "sites", "first change", "half way", "last change", "greatest at step"]
    return Table("Change from step to step, relative to the output: mean and spread", header, rows)
