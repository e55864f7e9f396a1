"""Latents are bit-identical to those of the published packages on the same tiny pipelines."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tgate as published
import torch
from DeepCache import DeepCacheSDHelper
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback
from support import tiny
from support.comparisons import compared

import cachekit

STEPS = 6
MAKERS: dict[str, Callable[[], Any]] = {
    "sd": tiny.sd,
    "sdxl": tiny.sdxl,
    "pixart_alpha": tiny.pixart,
    "pixart_sigma": functools.partial(tiny.pixart, sigma=True),
    "svd": tiny.svd,
}
LOADERS = {
    "sd": published.TgateSDLoader,
    "sdxl": published.TgateSDXLLoader,
    "pixart_alpha": published.TgatePixArtAlphaLoader,
    "pixart_sigma": published.TgatePixArtSigmaLoader,
    "svd": published.TgateSVDLoader,
}

shared = tiny.sharing(MAKERS)


def cached(name: str, *specs: str, **changes: Any) -> torch.Tensor:
    with cachekit.apply(shared(name), specs):
        return plain(name, **changes)


def plain(name: str, **changes: Any) -> torch.Tensor:
    return tiny.latents(shared(name), **{"steps": STEPS, **changes})


def tgate_latents(name: str, m: int, intervals: tuple[int, int, int], **changes: Any) -> torch.Tensor:
    """Run the published method on a pipeline of its own: it cannot be undone."""
    pipe = MAKERS[name]()
    LOADERS[name](pipe)
    return published_call(pipe, m, intervals, **changes)


def published_call(
    pipe: Any, m: int, intervals: tuple[int, int, int], lcm: bool | None = None, **changes: Any
) -> torch.Tensor:
    given = tiny.arguments(pipe, **{"steps": STEPS, **changes}) | ({} if lcm is None else {"lcm": lcm})
    output = pipe.tgate(**given, gate_step=m, **dict(zip(("sp_interval", "fi_interval", "warm_up"), intervals)))
    return output.frames if hasattr(output, "frames") else output.images


def tgate_spec(m: int, intervals: tuple[int, int, int]) -> str:
    sp_interval, fi_interval, warm_up = intervals
    return f"tgate:m={m},sp_interval={sp_interval},fi_interval={fi_interval},warm_up={warm_up}"


# -- tgate ------------------------------------------------------------------------------------------------

FIRST = (1, 1, 0)


@compared("tgate", "the package tgate", "name")
@pytest.mark.parametrize("m", [1, 2, 4, STEPS, STEPS + 3])
@pytest.mark.parametrize("name", MAKERS)
def test_first_version_of_tgate(name: str, m: int) -> None:
    assert torch.equal(cached(name, f"tgate:m={m}"), tgate_latents(name, m, FIRST))


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart_alpha", "pixart_sigma"])
def test_first_version_of_tgate_with_a_batch(name: str, batch: int) -> None:
    assert torch.equal(cached(name, "tgate:m=3", batch=batch), tgate_latents(name, 3, FIRST, batch=batch))


@compared("tgate", "the package tgate", "name")
@pytest.mark.parametrize(
    ("m", "intervals"),
    [(5, (3, 1, 1)), (4, (2, 2, 1)), (3, (5, 2, 0)), (2, (3, 2, 5)), (1, (5, 3, 2))],
)
@pytest.mark.parametrize("name", MAKERS)
def test_second_version_of_tgate(name: str, m: int, intervals: tuple[int, int, int]) -> None:
    assert torch.equal(cached(name, tgate_spec(m, intervals)), tgate_latents(name, m, intervals))


def test_published_defaults_of_the_second_version() -> None:
    ours = cached("sdxl", "tgate:m=10,sp_interval=5,fi_interval=1,warm_up=2", steps=13, batch=3)
    assert torch.equal(ours, tgate_latents("sdxl", 10, (5, 1, 2), steps=13, batch=3))


@pytest.mark.parametrize("name", MAKERS)
def test_the_gate_changes_the_latents(name: str) -> None:
    assert not torch.equal(cached(name, "tgate:m=3"), plain(name))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["sdxl", "pixart_alpha", "pixart_sigma"])
def test_tgate_of_latent_consistency_models(name: str, batch: int) -> None:
    """Without guidance each image keeps its own attention."""
    changes = {"guidance": 1.0, "batch": batch}
    assert torch.equal(cached(name, "tgate:m=2", **changes), tgate_latents(name, 2, FIRST, lcm=True, **changes))


# -- DeepCache --------------------------------------------------------------------------------------------


def deepcache_latents(name: str, interval: int, branch: int, **changes: Any) -> torch.Tensor:
    pipe = MAKERS[name]()
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    return tiny.latents(pipe, **{"steps": STEPS, **changes})


#: How many branches there are.
BRANCHES = {"sd": 12, "sdxl": 9}


@compared("deepcache", "the package DeepCache", BRANCHES)
@pytest.mark.parametrize(
    ("name", "branch", "interval"),
    [
        *((name, branch, 3) for name, count in BRANCHES.items() for branch in range(count)),
        *((name, branch, interval) for name, branch in (("sd", 6), ("sdxl", 4)) for interval in (2, 5)),
        *((name, 0, interval) for name in BRANCHES for interval in (2, 5)),
    ],
)
def test_deepcache(name: str, branch: int, interval: int) -> None:
    ours = cached(name, f"deepcache:interval={interval},branch={branch}")
    assert torch.equal(ours, deepcache_latents(name, interval, branch))


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_deepcache_with_a_batch(name: str) -> None:
    ours = cached(name, "deepcache:interval=3,branch=1", batch=3)
    assert torch.equal(ours, deepcache_latents(name, 3, 1, batch=3))


@pytest.mark.parametrize(("name", "last"), [("sd", 11), ("sdxl", 8)])
def test_every_branch_of_deepcache_changes_the_latents(name: str, last: int) -> None:
    found = [cached(name, f"deepcache:interval=3,branch={branch}") for branch in (0, last)]
    assert not any(torch.equal(one, plain(name)) for one in found)
    assert not torch.equal(*found)


# -- guidance cut off -------------------------------------------------------------------------------------


@compared("adaptive_guidance", "diffusers' callbacks that cut guidance off", "name")
@pytest.mark.parametrize("m", [1, 3, 5])
@pytest.mark.parametrize(("name", "callback"), [("sd", SDCFGCutoffCallback), ("sdxl", SDXLCFGCutoffCallback)])
def test_guidance_cut_off_by_the_callback(name: str, callback: Any, m: int) -> None:
    cut = callback(cutoff_step_ratio=None, cutoff_step_index=m - 1)
    assert torch.equal(cached(name, f"adaptive_guidance:m={m}"), plain(name, callback_on_step_end=cut))


# -- both -------------------------------------------------------------------------------------------------

BOTH = {"sd": published.TgateSDDeepCacheLoader, "sdxl": published.TgateSDXLDeepCacheLoader}


@compared("tgate", "the package tgate, beside DeepCache", "name")
@pytest.mark.parametrize(("m", "interval", "branch"), [(4, 3, 0), (3, 2, 4), (7, 3, 1)])
@pytest.mark.parametrize("name", BOTH)
def test_tgate_with_deepcache(name: str, m: int, interval: int, branch: int) -> None:
    """The published helper is restarted before steps m - 1 and m; the plan restarts there by itself."""
    pipe = BOTH[name](MAKERS[name](), cache_interval=interval, cache_branch_id=branch)
    theirs = published_call(pipe, m, FIRST, steps=9)
    specs = [f"tgate:m={m}", f"deepcache:interval={interval},branch={branch}"]
    assert torch.equal(cached(name, *specs, steps=9), theirs)
    assert torch.equal(cached(name, *reversed(specs), steps=9), theirs)


# -- parameters that switch nothing off -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((name, f"tgate:m={m}") for name in MAKERS for m in (3, 50)),
        *((name, "deepcache:interval=1") for name in ("sd", "sdxl", "svd")),
        *((name, "adaptive_guidance:m=3") for name in MAKERS),
        *((name, "adaptive_guidance:threshold=1.0") for name in MAKERS),
        *((name, "null_text:after=3") for name in MAKERS),
    ],
)
def test_parameters_without_effect_give_the_plain_latents(name: str, spec: str) -> None:
    assert torch.equal(cached(name, spec, steps=3), plain(name, steps=3))
