"""The rows of `python -m benchmarks.gpu`, most important first, and how each is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch

import cachekit
from cachekit.bench.caches import enabled
from cachekit.bench.cells import Method
from cachekit.bench.peers import published, twin
from cachekit.interface.specs import parse_all, split_specs
from cachekit.registry.catalog import installed

from .gpu_models import CHEAP_SECONDS, Model, steps_of

#: What a row is, besides the methods of a cell.
COMPILED, CHECK = "compiled", "check"
_PACKAGES = {"cache-dit": "cache_dit", "published deepcache": "DeepCache", "published tgate": "tgate"}


@dataclass(frozen=True)
class Row:
    """One configuration of one model, or one check."""

    model: str
    kind: str
    text: str

    @property
    def key(self) -> str:
        """Name of the row in the results."""
        return f"{self.model} | {self.kind} | {self.text}"


#: Of each model the rows in the order of their importance, in tiers; `{steps}`, `{gate}` and `{half}` are replaced.
_NO_OP = "taylorseer:interval=1"
_FIRST_BLOCK, _TAYLOR = "diffusers FirstBlockCache:threshold=0.05", "diffusers TaylorSeerCache:cache_interval=5"
_TAYLOR += ",disable_cache_before_step=3,max_order=1"
_PAB = "diffusers PyramidAttentionBroadcast:spatial_attention_block_skip_range=2"
_DB = "cache-dit DBCache:Fn_compute_blocks=1,residual_diff_threshold=0.08,max_warmup_steps=8"
_TIERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sdxl": (
        ("plain", "tgate:m={steps}+deepcache:interval=1+adaptive_guidance:m={steps}"),
        ("deepcache:interval=3", "published deepcache:interval=3", "tgate:m={gate}", "forecast:interval=3"),
        ("tgate:m={gate}+deepcache:interval=3", "published tgate:m={gate}", "adaptive_guidance:m={gate}"),
        ("pab", "fastercache", "published tgate:m={gate}+deepcache:interval=3"),
    ),
    "flux": (
        ("plain", _NO_OP),
        ("forecast:interval=3", "fbcache", _FIRST_BLOCK, "taylorseer", _TAYLOR),
        (_DB, "teacache", "fbcache:threshold=0"),
        ("pab", _PAB, "diffusers FasterCache:is_guidance_distilled=true"),
    ),
    "sd3": (
        ("plain", _NO_OP),
        ("forecast:interval=3", "fbcache", "taylorseer", _TAYLOR),
        ("adaptive_guidance:m={half}", "teacache", _FIRST_BLOCK, "fbcache:threshold=0"),
        ("adaptive_guidance:m={half}+forecast:interval=3", "taylorseer:at=features", _PAB),
    ),
    "pixart-alpha": (
        ("plain", "tgate:m={steps}+fora:interval=1"),
        ("tgate:m={gate}", "forecast:interval=3", "fbcache", "taylorseer"),
        (_DB, "teacache", "tgate:m={gate}+forecast:interval=3"),
        ("pab", "fastercache", _PAB),
    ),
    "wan": (
        ("plain", "tgate:m={steps}+fora:interval=1"),
        ("forecast:interval=3", "tgate:m={gate}", "fbcache", _FIRST_BLOCK),
        ("taylorseer", _TAYLOR, _DB, "teacache"),
        ("pab", _PAB, "adaptive_guidance:m={half}"),
    ),
}
_COMPILED = ("plain", "forecast:interval=3", "fbcache", "taylorseer")
#: Tier after which the checks run.
_CHECKED = 2


def rows(tiny: bool, checks: tuple[str, ...]) -> list[Row]:
    """List all rows, most important first: of each tier, those of one model after another."""
    found = []
    for tier in range(max(map(len, _TIERS.values()))):
        if tier == _CHECKED:
            found += [Row("all", CHECK, check) for check in checks]
        for model, tiers in _TIERS.items():
            found += [_row(model, text, tiny) for text in (tiers[tier] if tier < len(tiers) else ())]
    return found + [Row(model, COMPILED, text) for model in ("flux", "wan") for text in _COMPILED]


def _row(model: str, text: str, tiny: bool) -> Row:
    steps = steps_of(model, tiny)
    text = text.format(steps=steps, gate=steps * 2 // 5, half=steps // 2)
    kind, _, rest = text.partition(" ")
    return Row(model, kind, rest) if rest else Row(model, Method.CACHEKIT.value, text)


def is_planned(text: str) -> bool:
    """Whether the actions of these specs follow from the number of steps alone, so that they can be estimated."""
    choices = [choice for policy in specs(text) for choice in policy.chosen().values()]
    return not any(isinstance(choice.when, cachekit.Indicator) for choice in choices)


def specs(text: str) -> list[Any]:
    """Parse specs joined by `+`; none for `plain`."""
    return [] if text == "plain" else list(parse_all(split_specs(text), installed()))


def repeats(seconds: float) -> int:
    """Number of timed runs of a row, where one without a cache takes `seconds`."""
    return 5 if seconds < 1 else 3 if seconds < CHEAP_SECONDS else 2


def measure(row: Row, model: Model) -> dict[str, Any]:
    """Measure a row: a counted run that warms up, then timed ones, in turns with uncached runs where those are cheap."""
    if row.text == "plain":
        return _plain(model)
    for start, package in _PACKAGES.items():
        if f"{row.kind} {row.text}".startswith(start) and not find_spec(package):
            raise ModuleNotFoundError(f"needs the package {package}")
    plain, copy = model.plain, twin(model.pipe)
    cached, uncached, kept = [], [], None
    with contender(row, copy, model.steps) as (begin, attachment):
        with begin() as (call, more):
            macs = model.counted(copy, call, **more)
        for _ in range(repeats(plain.seconds)):
            if plain.seconds < CHEAP_SECONDS:
                uncached.append(model.timed_plain().seconds)
            with begin() as (call, more):
                made = model.run(call, **more)
            cached.append(made.seconds)
        if attachment is not None:
            kept = attachment.report().cache_bytes
    return {
        **figures(model, cached, uncached, macs),
        "kept_bytes": kept,
        **compared(made.latents, model),
        **_extra(made),
    }


def _plain(model: Model) -> dict[str, Any]:
    """Time the uncached pipeline, which the other rows are compared with."""
    made = model.plain
    for _ in range(repeats(made.seconds) - 1):
        made = model.timed_plain()
    seconds = list(model.plain_seconds)
    return {
        **figures(model, seconds, seconds, model.macs),
        "kept_bytes": 0,
        **compared(made.latents, model),
        **_extra(made),
    }


def figures(model: Model, cached: list[float], uncached: list[float], macs: int | None) -> dict[str, Any]:
    """Compute speedups from the medians of the seconds, with all runs of the uncached pipeline where none was beside."""
    against = uncached or model.plain_seconds
    return {
        "steps": model.steps,
        "seconds": [round(value, 5) for value in cached],
        "uncached_seconds": [round(value, 5) for value in against],
        "speedup": median(against) / median(cached),
        "macs": macs,
        "uncached_macs": model.macs,
        "mac_reduction": model.macs / macs if macs else None,
    }


def compared(latents: torch.Tensor, model: Model) -> dict[str, Any]:
    """Compare latents with those of the uncached pipeline; random weights make no images, so only equality counts."""
    own, reference = latents.float(), model.plain.latents.float()
    difference = ((own - reference).norm() / reference.norm()).item()
    return {"equal": torch.equal(own, reference), "difference": difference, "finite": bool(own.isfinite().all())}


def _extra(made: Any) -> dict[str, Any]:
    return {"extra_bytes": made.extra_bytes}


#: Enables a contender for one run: what to call, and arguments of its own.
Begin = Callable[[], Any]


@contextmanager
def contender(row: Row, copy: Any, steps: int) -> Iterator[tuple[Begin, Any]]:
    """Prepare a copy of the pipeline for a row: how each run begins, and cachekit's attachment if it is that."""
    if row.kind in (Method.CACHEKIT.value, COMPILED):
        with cachekit.apply(copy, specs(row.text)) as attachment:
            yield lambda: _as_is(copy), attachment
    elif row.kind == Method.PUBLISHED.value:
        call, more = published(copy, specs(row.text))
        yield lambda: _as_is(call, **more), None
    else:
        # These caches keep what they held for a run that follows, so each run has them enabled anew.
        yield lambda: _enabled(copy, Method(row.kind), row.text, steps), None


@contextmanager
def _as_is(call: Any, **more: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    yield call, more


@contextmanager
def _enabled(copy: Any, method: Method, text: str, steps: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    with enabled(copy, method, text, steps):
        yield copy, {}
