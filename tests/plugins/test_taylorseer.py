"""TaylorSeer equals diffusers' own cache, and a replay where only the last block is forecast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import factorial
from typing import Any, ClassVar

import pytest
import torch
from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache
from support import replays, tiny
from support.comparisons import ROUNDING, compared

import cachekit
from cachekit import Entry, Kind, Mask, Moment, Taylor

TaylorSeer = cachekit.policies()["taylorseer"]
hooks = pytest.importorskip("diffusers.hooks.hooks")

STEPS = 9
PIPES: dict[str, Callable[[], Any]] = {
    "pixart": tiny.pixart, "sd3": tiny.sd3, "flux": tiny.flux, "wan": tiny.wan
}  # fmt: skip
#: Interval, order and steps before the first forecast.
CASES = [(2, 1, 3), (3, 2, 3), (4, 1, 1), (3, 2, 2)]

shared = tiny.sharing(PIPES)
plain = tiny.uncached(shared, steps=STEPS)


@functools.cache
def of_diffusers(name: str, interval: int, order: int, before: int) -> torch.Tensor:
    """Latents of a run with diffusers' cache on all attention and feed-forward."""
    pipe = PIPES[name]()
    config = TaylorSeerCacheConfig(
        cache_interval=interval,
        disable_cache_before_step=before,
        max_order=order,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[replays.LAYERS.pattern],
    )
    apply_taylorseer_cache(pipe.transformer, config)
    if not hasattr(pipe.transformer, "cache_context"):  # its pipeline doesn't name its calls either
        hooks._set_cache_context(pipe.transformer, hooks.CacheContext("all"))
    return tiny.latents(pipe, steps=STEPS)


def full_steps(interval: int, before: int) -> tuple[int, ...]:
    """Full steps of diffusers' cache: those before, and then with a phase that begins one step later."""
    return tuple(step for step in range(STEPS) if step < before or (step - before - 1) % interval == 0)


def cached(name: str, policy: Any) -> torch.Tensor:
    with cachekit.apply(shared(name), policy) as attachment:
        found = tiny.latents(shared(name), steps=STEPS)
        plan, calls = attachment.plan(STEPS), 2 if name == "wan" else 1
        assert replays.counted(attachment.report()) == replays.planned(plan, calls)
    return found


class InTheirOrder(Taylor):
    """The same series in diffusers' order: differences first, then term by term."""

    name: ClassVar[str] = "in_their_order"

    def predict(self, history: Sequence[Entry], at: Moment, given: Any = ()) -> Any:
        steps = [entry.at.step for entry in history]
        streams = zip(*(entry.tensors for entry in history))
        return tuple(self.series(differences(values, steps), at.step - steps[0]) for values in streams)

    def series(self, factors: Sequence[torch.Tensor], distance: int) -> torch.Tensor:
        total = torch.zeros_like(factors[0])
        for degree, factor in enumerate(factors):
            total = total + factor * (distance**degree / factorial(degree))
        return total


def differences(values: Sequence[torch.Tensor], steps: Sequence[int]) -> list[torch.Tensor]:
    """Divided differences of the newest value, by their degree."""
    found = [values[0]]
    for before in differences(values[1:], steps[1:]) if len(values) > 1 else []:
        found.append((found[-1] - before) / (steps[0] - steps[1]))
    return found


@compared("taylorseer", "diffusers", "name", ROUNDING)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", PIPES)
def test_equal_to_diffusers_within_rounding(name: str, case: tuple[int, int, int]) -> None:
    """The engine adds up weighted outputs and diffusers weighted differences of them, which rounds otherwise."""
    interval, order, before = case
    mask = ";".join(map(str, full_steps(interval, before)))
    found = cached(name, f"taylorseer:order={order},when=mask({mask})")
    torch.testing.assert_close(found, of_diffusers(name, *case), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain(name), atol=1e-3)
    assert torch.equal(tiny.latents(shared(name), steps=STEPS), plain(name))
    assert torch.equal(cached(name, f"taylorseer:order={order},when=mask({mask})"), found)


@compared("taylorseer", "diffusers, with its order of operations", "name")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", PIPES)
def test_equal_to_diffusers_to_the_bit_in_the_same_order_of_operations(name: str, case: tuple[int, int, int]) -> None:
    interval, order, before = case
    policy = TaylorSeer(when=Mask(steps=full_steps(interval, before)), what=InTheirOrder(order=order))
    assert torch.equal(cached(name, policy), of_diffusers(name, *case))


@pytest.mark.parametrize("name", PIPES)
def test_the_layers_are_all_attention_and_feed_forward(name: str) -> None:
    denoiser = shared(name).transformer
    with cachekit.apply(shared(name), "taylorseer") as attachment:
        found = {bound.target.name for bound in attachment.plan(STEPS).assignments}
    assert found == set(replays.layers_of(name, denoiser))


def series(order: int) -> replays.Series:
    def value(steps: Sequence[int], values: Sequence[torch.Tensor], step: int) -> torch.Tensor:
        wide = [value.double() for value in values[: order + 1]]
        terms = enumerate(differences(wide, steps))
        return sum(factor * ((step - steps[0]) ** degree / factorial(degree)) for degree, factor in terms)

    return value


@compared("taylorseer", "a replay of the last block", "name", ROUNDING)
@pytest.mark.parametrize(
    ("name", "spec", "full", "order"),
    [
        ("pixart", "taylorseer:at=features,interval=2", [0, 1, 2, 4, 6, 8], 1),
        ("flux", "taylorseer:at=features,interval=3,order=2", [0, 1, 2, 5, 8], 2),
        ("wan", "taylorseer:at=features,interval=3,warm_up=1", [0, 3, 6], 1),
        ("small", "taylorseer:at=features,interval=2,order=2,warm_up=2", [0, 1, 3, 5, 7], 2),
    ],
)
def test_the_last_block_alone_equals_a_replay(name: str, spec: str, full: list[int], order: int) -> None:
    replays.check(name, spec, replays.features_of, full, series(order), STEPS)


def test_the_last_block_alone_costs_less_than_all_layers() -> None:
    pipe, macs = tiny.flux(), {}
    for at in ("layers", "features"):
        with cachekit.apply(pipe, f"taylorseer:interval=3,at={at}") as attachment:
            tiny.latents(pipe, steps=STEPS)
            macs[at] = attachment.report().macs
    assert macs["features"] < macs["layers"] < attachment.report().baseline_macs


def test_a_model_without_such_layers_or_blocks_is_refused() -> None:
    sites = cachekit.SiteMap("Toy", (cachekit.Site("down", Kind.BLOCK),))
    for at, looked_for in (
        ("layers", "cross_attention, feed_forward, joint"),
        ("features", "blocks in a row, but Toy"),
    ):
        (choice,) = TaylorSeer(at=at).choices().values()
        with pytest.raises(cachekit.SiteError, match=f"looked for {looked_for}"):
            choice.where.find(sites)
