"""Recommend settings for a model: what is published for it, and up to three lines to paste, with their costs."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import resources
from typing import Any

from cachekit.costs.estimate import Estimate, Estimator
from cachekit.errors import CachekitError
from cachekit.interface.moment import OPEN
from cachekit.interface.presets import WORD, Preset, read
from cachekit.models.names import DEMOS, canonical, is_architecture
from cachekit.registry.catalog import installed
from cachekit.tools.calibrating.calibration import ships
from cachekit.tools.tuning.subject import Subject, presets_for


@dataclass(frozen=True)
class Rule:
    """A spec for a level, and the reason."""

    level: str
    spec: str
    why: str


@dataclass(frozen=True)
class Rules:
    """Rules of what is recommended: the contents of rules.json.

    Runs of fewer than `few_steps` steps leave no room between full steps. A published setting counts as balanced where
    its MAC reduction lies within `balanced`. Where the boldest line saves less than `least`, there are no lines.

    There are rules for each level where calibrations ship, where they would have to be made (a published setting comes
    before the second), the same under a scheduler of an order above one at a guidance scale above `high_guidance`,
    where a forecast without weights can miss by far, and where the scheduler adds noise in each step, so that only the
    clean sample holds still. Of several for one level, the first that saves more than the level before is taken.
    """

    few_steps: int
    balanced: tuple[float, float]
    least: float
    high_guidance: float
    calibrated: tuple[Rule, ...]
    uncalibrated: tuple[Rule, ...]
    high_order: tuple[Rule, ...]
    noisy: tuple[Rule, ...]

    @classmethod
    def read(cls) -> Rules:
        """Read the rules; docs/choosing.md has the measurements behind them."""
        data = json.loads(resources.files("cachekit.tools.tuning").joinpath("rules.json").read_text())
        names = ("calibrated", "uncalibrated", "high_order", "noisy")
        kinds = {name: tuple(Rule(**rule) for rule in data[name]) for name in names}
        return cls(data["few_steps"], tuple(data["balanced"]), data["least"], data["high_guidance"], **kinds)


_CALIBRATED = "calibrated"
RULES = Rules.read()
LEVELS = tuple(rule.level for rule in RULES.calibrated)


@dataclass(frozen=True)
class Costs:
    """What a run costs by the estimate; None where the model's inputs aren't known.

    `open` is set where a policy decides during the run, whose steps the estimate counts as computed.
    """

    steps: int
    mac_reduction: float | None = None
    macs: int | None = None
    cache_bytes: int | None = None
    open: bool = False


@dataclass(frozen=True)
class Setting:
    """A preset that ships for the model, or for its class; `refused` is why it doesn't fit, "" where it does.

    Its `costs` are those of the run that it was published for, `asked_costs` those of the run that is asked about; None
    where it doesn't fit such a run.
    """

    name: str
    summary: str
    specs: list[str]
    source: str
    published_for: str
    costs: Costs
    asked_costs: Costs | None = None
    refused: str = ""


@dataclass(frozen=True)
class Line:
    """A line to paste for one level; `first` is the command that has to be run before it, "" where there is none."""

    level: str
    code: str
    specs: list[str]
    costs: Costs
    why: str
    first: str = ""


@dataclass(frozen=True)
class Recommendation:
    """What a model can use, what is published for it, and lines for the levels; `note` says what is missing."""

    model: str
    denoiser: str
    adapter: str
    architecture: str | None
    scheduler: str
    steps: int
    guidance: str
    sites: dict[str, int]
    settings: list[Setting] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    note: str = ""

    def data(self) -> dict[str, Any]:
        """Write the recommendation as plain data."""
        return asdict(self)


def recommend(model: str, steps: int | None = None, guidance: float | None = None) -> Recommendation:
    """Recommend settings for a model in seconds, without running it or reading its weights.

    `model` is the name of an architecture, a folder, a hub id, or the name of an embedded model. `steps` and `guidance`
    are those of a run, by default the pipeline's own. Raises a `CachekitError` for a model that can't be read or has no
    adapter.
    """
    subject = Subject.of(model, steps, guidance)
    price = _Prices(subject)
    settings = [_setting(name, preset, price) for name, preset in presets_for(subject).items()]
    lines = _rising(_lines(subject, settings, price))
    known = subject.architecture
    return Recommendation(
        model=model,
        denoiser=type(subject.denoiser).__name__,
        adapter=subject.adapter,
        architecture=known.name if known else None,
        scheduler=subject.scheduler,
        steps=subject.steps,
        guidance=subject.guidance,
        sites=dict(sorted(Counter(str(site.kind) for site in subject.sites.sites).items())),
        settings=settings,
        lines=lines if _is_worth(lines) else [],
        note=_note(subject, price, lines),
    )


class _Prices:
    """Estimates the costs of specs on a subject; `problem` is why there are none, "" where there are."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.problem = ""
        self._estimate: Callable[[tuple[str, ...], int], Estimate] | None = None
        try:
            estimator = _estimator(subject)
            self._estimate = cache(lambda specs, steps: estimator(specs, steps))
        except CachekitError as error:
            self.problem = str(error)

    @property
    def steps(self) -> int:
        """Steps of a run of the subject."""
        return self._subject.steps

    def __call__(self, specs: Sequence[str], steps: int | None = None) -> Costs:
        """Estimate a run, by default of the subject's steps; raises `CachekitError` for specs that don't fit."""
        steps = steps or self.steps
        if self._estimate is None:
            return Costs(steps)
        found = self._estimate(tuple(specs), steps)
        is_open = any(OPEN in row.actions for row in found.plan.rows)
        return Costs(steps, found.mac_reduction, found.macs, found.cache_bytes, is_open)

    def full_steps(self, spec: str) -> list[int]:
        """List the steps in which the denoiser runs; none where the model's inputs aren't known."""
        if self._estimate is None:
            return []
        steps = self._estimate((spec,), self._subject.steps).steps
        return [place for place, step in enumerate(steps) if step.macs > 0]


def _estimator(subject: Subject) -> Estimator:
    if not isinstance(subject.source, str) or subject.architecture is None:
        return Estimator.of(subject.source, guided=subject.guided)
    inputs = subject.architecture.inputs(2 if subject.guided else 1)
    return Estimator(subject.denoiser, inputs, subject.guided, installed())


def _setting(name: str, preset: Preset, price: _Prices) -> Setting:
    evidence = preset.evidence
    costs, asked, refused = Costs(evidence.steps or price.steps), None, ""
    try:
        _, specs = read(f"{WORD}:{name}", installed().policies)
        costs = price(specs, evidence.steps)
        asked = _or_none(price, specs)
    except CachekitError as error:
        refused = str(error)
    kind = evidence.architecture or evidence.pipeline or evidence.denoiser or ""
    source = evidence.source or _measured(preset)
    return Setting(name, preset.summary, preset.specs, source, kind, costs, asked, refused)


def _or_none(price: _Prices, specs: Sequence[str]) -> Costs | None:
    try:
        return price(specs)
    except CachekitError:
        return None


def _measured(preset: Preset) -> str:
    """Describe the evidence of a preset that was measured."""
    figures = preset.evidence.figures
    if figures is None:
        return "not measured"
    parts = [f"{figures.psnr:.1f} dB"] if figures.psnr is not None else []
    if figures.caption_match is not None and figures.uncached_caption_match is not None:
        parts.append(f"captions {figures.caption_match:.0%}, uncached {figures.uncached_caption_match:.0%}")
    return f"measured on {figures.images} images: {', '.join(parts)}"


def _rising(lines: Sequence[Line]) -> list[Line]:
    """Keep one line for each level, and none that saves no more than the one before it."""
    kept: list[Line] = []
    for line in lines:
        if not kept or (line.level != kept[-1].level and _saves_more(line, kept[-1])):
            kept.append(line)
    return kept


def _saves_more(line: Line, other: Line) -> bool:
    """Whether a line saves more than another, as far as the two digits show that are printed.

    Where costs aren't known, it is whether the lines differ.
    """
    if line.costs.mac_reduction is None or other.costs.mac_reduction is None:
        return line.code != other.code
    return round(line.costs.mac_reduction, 2) > round(other.costs.mac_reduction, 2)


def _is_worth(lines: Sequence[Line]) -> bool:
    """Whether the last line, which saves most, saves enough."""
    return bool(lines) and round(lines[-1].costs.mac_reduction or RULES.least, 2) >= RULES.least


def _lines(subject: Subject, settings: Sequence[Setting], price: _Prices) -> list[Line]:
    if subject.steps < RULES.few_steps:
        return _published_lines(settings)
    if subject.noisy:
        return [_line(rule, price) for rule in RULES.noisy]
    if all(_has_weights(rule.spec, subject, price) for rule in RULES.calibrated):
        return [_line(rule, price) for rule in RULES.calibrated]
    careful, balanced, *bold = RULES.high_order if _is_far(subject) else RULES.uncalibrated
    static = _balanced_setting(settings)
    middle = _from_setting(balanced.level, static) if static else _unshipped(balanced, subject, price)
    return [_unshipped(careful, subject, price), middle, *(_unshipped(rule, subject, price) for rule in bold)]


def _is_far(subject: Subject) -> bool:
    """Whether a forecast without weights can miss by far."""
    scale = math.inf if subject.scale is None else subject.scale
    return subject.high_order and subject.guided and scale > RULES.high_guidance


def _unshipped(rule: Rule, subject: Subject, price: _Prices) -> Line:
    """Make the line of a rule where no calibration ships."""
    return _to_calibrate(rule, subject, price) if rule.spec.startswith(_CALIBRATED) else _line(rule, price)


def _has_weights(spec: str, subject: Subject, price: _Prices) -> bool:
    """Whether a spec needs no weights, or those that it needs ship."""
    if not spec.startswith(_CALIBRATED):
        return True
    full = price.full_steps(spec)
    return bool(subject.weights) and ships(subject.weights, subject.scheduler, subject.steps, full, subject.scale)


def _line(rule: Rule, price: _Prices) -> Line:
    return Line(rule.level, _code([rule.spec]), [rule.spec], price([rule.spec]), rule.why)


def _to_calibrate(rule: Rule, subject: Subject, price: _Prices) -> Line:
    """Make the line of a rule whose weights have to be measured first, with the command that does so."""
    model = "FOLDER_OR_HUB_ID" if is_architecture(subject.model) else shlex.quote(subject.model)
    prompts = "" if canonical(subject.model) in DEMOS else " --prompts prompts.txt"
    # Each interval has a file of its own, for the scale of the run.
    file = f"calibration-{rule.spec.rpartition('=')[2]}.json"
    guidance = "" if subject.scale is None else f" --guidance {subject.scale:g}"
    command = (
        f"cachekit calibrate {model}{prompts} --spec {rule.spec} --steps {subject.steps}{guidance} --output {file}"
    )
    specs = [f"{rule.spec},file={file}"]
    return Line(rule.level, _code(specs), specs, price([rule.spec]), rule.why, command)


def _from_setting(level: str, setting: Setting) -> Line:
    name, costs = f"{WORD}:{setting.name}", setting.asked_costs or setting.costs
    published = "" if costs.steps == setting.costs.steps else f", published for {setting.costs.steps} steps"
    return Line(level, _code([name]), setting.specs, costs, f"{setting.summary}{published}")


def _static(settings: Sequence[Setting]) -> list[Setting]:
    """List the settings that fit, save something, and have costs known before a run, the cheapest run last."""
    fitting = [one for one in settings if one.asked_costs and not one.asked_costs.open and _reduction(one) > 1]
    return sorted(fitting, key=_reduction)


def _reduction(setting: Setting) -> float:
    """MAC reduction in a run of the model's steps; 0 where it isn't known."""
    return (setting.asked_costs and setting.asked_costs.mac_reduction) or 0.0


def _balanced_setting(settings: Sequence[Setting]) -> Setting | None:
    """Choose, of the published settings that count as balanced, the one that keeps the fewest bytes."""
    low, high = RULES.balanced
    long = [one for one in settings if one.costs.steps >= RULES.few_steps]
    found = [one for one in _static(long) if low <= _reduction(one) <= high]
    return min(found, key=lambda one: (one.asked_costs and one.asked_costs.cache_bytes) or 0, default=None)


def _published_lines(settings: Sequence[Setting]) -> list[Line]:
    """Make lines for a run of few steps, of settings for such runs: what saves least, the middle one, and the most."""
    found = _static([one for one in settings if one.costs.steps < RULES.few_steps])
    if not found:
        return []
    chosen = (found[0], found[len(found) // 2], found[-1])
    return [_from_setting(level, setting) for level, setting in zip(LEVELS, chosen)]


def _code(specs: Sequence[str]) -> str:
    return f"cachekit.apply(pipe, {json.dumps(specs[0] if len(specs) == 1 else list(specs))})"


def _note(subject: Subject, price: _Prices, lines: Sequence[Line]) -> str:
    if not lines:
        return (
            f"{subject.steps} steps leave nothing to skip between, and no setting for so few is published for this"
            " model; take fewer steps instead"
        )
    if not _is_worth(lines):
        return (
            f"{subject.steps} steps leave little to skip between: the best setting saves"
            f" {lines[-1].costs.mac_reduction:.2f}x, less than {RULES.least:g}x; take fewer steps instead"
        )
    if price.problem:
        return f"no costs: {price.problem}"
    return "" if len(lines) > 1 else f"one line alone: no other setting for {subject.steps} steps saves more"
