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
from cachekit.interface.specs import parse_all, split_specs
from cachekit.registry.catalog import installed
from cachekit.tools.bench.caches import enabled
from cachekit.tools.bench.cells import Method
from cachekit.tools.bench.peers import published, twin

from .gpu_models import Model, Run, steps_of

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


#: Changes nothing, with a switch at each attention and feed-forward.
_NO_OP = "taylorseer:interval=1"
#: Random weights change the first block's residual more than trained ones do, so a usual threshold would skip nothing:
#: with this one all steps are skipped that the method lets be skipped.
_ALWAYS = "1e9"
_FB, _FIRST_BLOCK = f"fbcache:threshold={_ALWAYS}", f"diffusers FirstBlockCache:threshold={_ALWAYS}"
_TAYLOR = "diffusers TaylorSeerCache:cache_interval=5,disable_cache_before_step=3,max_order=1"
_PAB = "diffusers PyramidAttentionBroadcast:spatial_attention_block_skip_range=2"
_DB = f"cache-dit DBCache:Fn_compute_blocks=1,residual_diff_threshold={_ALWAYS},max_warmup_steps=8"
#: Of each model the rows in the order of their importance, in tiers; `{steps}`, `{gate}` and `{half}` are replaced.
_TIERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sdxl": (
        ("plain", "tgate:m={steps}+deepcache:interval=1+adaptive_guidance:m={steps}"),
        ("deepcache:interval=3", "published deepcache:interval=3", "tgate:m={gate}", "forecast:interval=3"),
        ("tgate:m={gate}+deepcache:interval=3", "published tgate:m={gate}", "adaptive_guidance:m={gate}"),
        ("pab", "fastercache", "published tgate:m={gate}+deepcache:interval=3"),
    ),
    "flux": (
        ("plain", _NO_OP),
        ("forecast:interval=3", _FB, _FIRST_BLOCK, "taylorseer", _TAYLOR),
        (_DB, "teacache", "fbcache:threshold=0"),
        ("pab", _PAB, "fbcache", "diffusers FasterCache:is_guidance_distilled=true"),
    ),
    "sd3": (
        ("plain", _NO_OP),
        ("forecast:interval=3", _FB, "taylorseer"),
        (_DB, "adaptive_guidance:m={half}", "teacache", "fbcache:threshold=0"),
        ("adaptive_guidance:m={half}+forecast:interval=3", "taylorseer:at=features"),
    ),
    "pixart-alpha": (
        ("plain", _NO_OP),
        ("tgate:m={gate}", "published tgate:m={gate}", "forecast:interval=3", _FB, "taylorseer"),
        (_DB, "teacache", "tgate:m={gate}+forecast:interval=3"),
        ("pab", "fastercache"),
    ),
    "wan": (
        ("plain", _NO_OP),
        ("forecast:interval=3", "tgate:m={gate}", _FB, _FIRST_BLOCK),
        ("taylorseer", _TAYLOR, _DB, "teacache"),
        ("pab", _PAB, "adaptive_guidance:m={half}"),
    ),
}
#: Policies that act in a window of timesteps, which an estimate lacks.
_WINDOWED = ("pab", "fastercache")
#: Of the models whose repeated blocks diffusers names, which it does for neither SD3 nor PixArt.
_COMPILED = {
    "flux": ("uncached", "forecast:interval=3", _FB, "taylorseer"),
    "wan": ("uncached", "forecast:interval=3", _FB, "taylorseer"),
    "sdxl": ("uncached", "forecast:interval=3", "deepcache:interval=3", "tgate:m={gate}"),
}
#: Tier before which the checks run, except one: a capture that fails could harm what runs after it.
_CHECKED, LAST_CHECK = 2, "a CUDA graph outlives a cached run"


def rows(tiny: bool, checks: tuple[str, ...]) -> list[Row]:
    """List all rows, most important first: of each tier, those of one model after another."""
    found = []
    for tier in range(max(map(len, _TIERS.values()))):
        if tier == _CHECKED:
            found += [Row("all", CHECK, check) for check in checks if check != LAST_CHECK]
        for model, tiers in _TIERS.items():
            found += [_row(model, text, tiny) for text in (tiers[tier] if tier < len(tiers) else ())]
    for model, texts in _COMPILED.items():
        found += [Row(model, COMPILED, _at(text, model, tiny)) for text in texts]
    return found + [Row("all", CHECK, LAST_CHECK)]


def _at(text: str, model: str, tiny: bool) -> str:
    steps = steps_of(model, tiny)
    return text.format(steps=steps, gate=steps * 2 // 5, half=steps // 2)


def _row(model: str, text: str, tiny: bool) -> Row:
    if text == "plain":
        return Row(model, Method.PLAIN.value, "uncached")
    text = _at(text, model, tiny)
    kind, _, rest = text.partition(" ")
    return Row(model, kind, rest) if rest else Row(model, Method.CACHEKIT.value, text)


def is_planned(text: str) -> bool:
    """Whether the actions of these specs follow from the number of steps alone, so that they can be estimated."""
    policies = specs(text)
    choices = [choice for policy in policies for choice in policy.chosen().values()]
    decided = any(isinstance(choice.when, cachekit.Indicator) for choice in choices)
    return not decided and not any(policy.name in _WINDOWED for policy in policies)


def specs(text: str) -> list[Any]:
    """Parse specs joined by `+`; none for `uncached`."""
    return [] if text == "uncached" else list(parse_all(split_specs(text), installed()))


def repeats(seconds: float) -> tuple[int, int]:
    """Choose how often a row and the uncached pipeline beside it are timed, where the latter takes `seconds`.

    Long runs on a GPU differ little, so one of each row will do.
    """
    return (3, 3) if seconds < 1 else (2, 1) if seconds < 2.5 else (1, 0)


def measure(row: Row, model: Model) -> dict[str, Any]:
    """Measure a row: a counted run that warms up, then timed ones, with uncached ones between if those are cheap."""
    plain = model.plain
    if row.kind == Method.PLAIN.value:
        made = model.timed_plain()
        return {
            **figures(model, model.plain_seconds, model.plain_seconds, model.macs),
            "kept_bytes": 0,
            **compared(made, model),
        }
    for start, package in _PACKAGES.items():
        if f"{row.kind} {row.text}".startswith(start) and not find_spec(package):
            raise ModuleNotFoundError(f"needs the package {package}")
    copy, cached, uncached = twin(model.pipe), list[float](), list[float]()
    with contender(row, copy, model.steps) as (begin, attachment):
        with begin() as (call, more):
            macs = model.counted(copy, call, **more)
        times, plain_times = repeats(plain.seconds)
        for turn in range(times):
            if turn < plain_times:
                uncached.append(model.timed_plain().seconds)
            with begin() as (call, more):
                made = model.run(call, **more)
            cached.append(made.seconds)
        kept = attachment.report().cache_bytes if attachment else None
    beside = uncached if len(uncached) > 1 else model.plain_seconds
    return {**figures(model, cached, beside, macs), "kept_bytes": kept, **compared(made, model)}


def figures(model: Model, cached: list[float], uncached: list[float], macs: int | None) -> dict[str, Any]:
    """Compute the speedup from the medians of the seconds, and the reduction of the MACs where they were counted."""
    return {
        "steps": model.steps,
        "seconds": [round(value, 5) for value in cached],
        "uncached_seconds": [round(value, 5) for value in uncached],
        "speedup": median(uncached) / median(cached),
        "macs": macs,
        "uncached_macs": model.macs,
        "mac_reduction": model.macs / macs if macs else None,
    }


def compared(made: Run, model: Model) -> dict[str, Any]:
    """Compare latents with those of the uncached pipeline; random weights make no images, so only equality counts."""
    own, reference = made.latents.float(), model.plain.latents.float()
    return {
        "equal": torch.equal(own, reference),
        "difference": ((own - reference).norm() / reference.norm()).item(),
        "finite": bool(own.isfinite().all()),
        "extra_bytes": made.extra_bytes,
    }


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
