"""Runs within a `using` block follow its specs and limits, each thread's and task's its own; all else stays."""

from __future__ import annotations

import asyncio
import copy
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support import tiny

import cachekit
from cachekit.errors import AttachmentError, BudgetError, SiteError, SpecError

STEPS = 6
FORECAST, TGATE, DEEP = "forecast:interval=3", "tgate:m=3", "deepcache:interval=2"
SPECS: list[tuple[str, ...]] = [(FORECAST,), (TGATE,), (TGATE, DEEP), ("taylorseer",), ("adaptive_guidance:m=2",), ()]


def latents(pipe: Any, **given: Any) -> torch.Tensor:
    return tiny.latents(pipe, **{"steps": STEPS, **given})


@functools.cache
def alone(*specs: str, **limits: Any) -> torch.Tensor:
    """Draw with these specs applied and nothing else."""
    pipe = tiny.small()
    if specs:
        cachekit.apply(pipe, specs, **limits)
    return latents(pipe)


@pytest.fixture
def pipe() -> Any:
    return tiny.small()


def beside(pipe: Any) -> Any:
    """Make a pipeline with the same denoiser and a scheduler of its own."""
    parts = {**pipe.components, "scheduler": tiny.small().scheduler}
    other = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


# -- one thread -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("applied", [(), (FORECAST,), (TGATE, DEEP)], ids="+".join)
def test_each_block_draws_as_if_its_specs_were_applied(pipe: Any, applied: tuple[str, ...]) -> None:
    """Its targets may have no switch yet, or one for other policies."""
    before = tiny.state_of(pipe)[1:]
    attachment = attached(pipe, applied)
    for specs in SPECS + SPECS[::-1]:
        with attachment.using(specs) as block:
            assert torch.equal(latents(pipe), alone(*specs))
        assert [str(policy) for policy in block.policies] == list(specs)
        assert block.report() is attachment.report()
        assert {count.policy for count in block.report().counts} == set(specs)
        assert torch.equal(latents(pipe), alone(*applied))
    attachment.remove()
    assert tiny.state_of(pipe)[1:] == before


def attached(pipe: Any, specs: Any) -> Any:
    if specs:
        return cachekit.apply(pipe, specs)
    with pytest.warns(cachekit.IdleWarning, match=r"^no policy applied to StableDiffusionPipeline: .*using\(specs\)"):
        return cachekit.apply(pipe, specs)


def test_blocks_are_nested_and_left_by_exceptions(pipe: Any) -> None:
    with cachekit.apply(pipe, FORECAST) as attachment:
        with attachment.using(TGATE):
            assert attachment.plan(STEPS).columns()[0][0] == TGATE
            with attachment.using(DEEP):
                assert torch.equal(latents(pipe), alone(DEEP))
            with pytest.raises(ZeroDivisionError), attachment.using([]):
                raise ZeroDivisionError
            assert torch.equal(latents(pipe), alone(TGATE))
            with attachment.paused():
                assert torch.equal(latents(pipe), alone())
        assert torch.equal(latents(pipe), alone(FORECAST))


def test_a_policy_object_and_a_preset(pipe: Any) -> None:
    with cachekit.apply(pipe, FORECAST) as attachment:
        (policy,) = attachment.policies
        with attachment.using([policy.model_copy(update={"interval": 4})]):
            assert torch.equal(latents(pipe), alone("forecast:interval=4"))


@pytest.mark.parametrize(
    ("specs", "limits", "error"),
    [
        ("tgaet", {}, SpecError),
        (None, {}, SpecError),
        ("deepcache:branch=99", {}, SiteError),
        (["deepcache:interval=2", "cache:where=region(1)"], {}, cachekit.CachekitError),
        (TGATE, {"max_cache_bytes": 0}, BudgetError),
        (TGATE, {"cache_device": "nowhere"}, BudgetError),
    ],
)
def test_a_refused_block_changes_nothing(pipe: Any, specs: Any, limits: Any, error: type[Exception]) -> None:
    with cachekit.apply(pipe, FORECAST) as attachment:
        with tiny.leaves_no_trace(pipe), pytest.raises(error) as refused, attachment.using(specs, **limits):
            pass
        assert len(str(refused.value).splitlines()) == 1
        assert torch.equal(latents(pipe), alone(FORECAST))


def test_a_run_keeps_to_what_it_began_with(pipe: Any) -> None:
    """A block that is entered or left by a callback holds for later calls of the pipeline."""
    with cachekit.apply(pipe, TGATE) as attachment:
        block = attachment.using(DEEP)

        def switch(_: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            if step == 1:
                block.__enter__()
            return given

        assert torch.equal(latents(pipe, callback_on_step_end=switch), alone(TGATE))
        assert torch.equal(latents(pipe), alone(DEEP))
        block.__exit__(None, None, None)
        assert torch.equal(latents(pipe), alone(TGATE))


def test_removal_within_a_block(pipe: Any) -> None:
    before = tiny.state_of(pipe)[1:]
    attachment = cachekit.apply(pipe, FORECAST)
    with attachment.using(TGATE) as block:
        latents(pipe)
        cachekit.remove(pipe)
        assert torch.equal(latents(pipe), alone())
    assert block.report().policies == ["tgate"]
    assert tiny.state_of(pipe)[1:] == before
    with pytest.raises(AttachmentError, match=r"was removed: call cachekit\.apply"), attachment.using(DEEP):
        pass
    assert tiny.state_of(pipe)[1:] == before


def test_a_copy_follows_what_was_applied(pipe: Any) -> None:
    with cachekit.apply(pipe, FORECAST) as attachment, attachment.using(TGATE):
        latents(pipe)
        twin = copy.deepcopy(pipe)
        assert torch.equal(latents(twin), alone(FORECAST))
        copied = cachekit.attachment(twin)
        assert copied is not None
        with copied.using(DEEP):
            assert torch.equal(latents(twin), alone(DEEP))
            assert torch.equal(latents(pipe), alone(TGATE))


def test_no_policy_refuses_nothing(pipe: Any) -> None:
    """What a policy could not follow runs as without cachekit: several timesteps in a batch, gradients."""
    sample, text = torch.ones(2, 4, 16, 16, requires_grad=True), tiny.text(2)
    times = torch.tensor([7, 3])
    plain = pipe.unet(sample, times, text).sample
    with cachekit.apply(pipe, DEEP) as attachment:
        with pytest.raises(cachekit.GuidanceError):
            pipe.unet(sample, times, text)
        with attachment.using([]):
            found = pipe.unet(sample, times, text).sample
            found.sum().backward()
    assert torch.equal(found, plain)
    assert sample.grad is not None


# -- limits and reports -----------------------------------------------------------------------------------


def test_limits_belong_to_blocks(pipe: Any) -> None:
    with cachekit.apply(pipe, (TGATE, DEEP), max_cache_bytes=10**9) as attachment:
        whole = latents(pipe)
        needed = attachment.report().cache_bytes
        less = needed // 2
        with attachment.using((TGATE, DEEP), max_cache_bytes=less) as block:
            limited = latents(pipe)
            with attachment.using(DEEP) as inner:
                latents(pipe)
            with attachment.using((TGATE, DEEP), max_cache_bytes=None) as lifted:
                assert torch.equal(latents(pipe), whole)
        assert torch.equal(latents(pipe), whole)
    assert 0 < block.report().cache_bytes <= less < needed == lifted.report().cache_bytes
    assert inner.report().cache_bytes <= less
    assert torch.equal(limited, alone(TGATE, DEEP, max_cache_bytes=less))
    assert not torch.equal(limited, whole)


def test_a_report_has_its_seconds_and_what_they_are_worth(pipe: Any) -> None:
    with cachekit.apply(pipe, FORECAST) as attachment:
        latents(pipe)
        cached = attachment.report()
        assert cached.speedup is None
        start = time.perf_counter()
        with attachment.using([]):
            latents(pipe)
        whole, plain = time.perf_counter() - start, attachment.report()
        assert 0 < plain.seconds < whole
        assert cached.speedup == plain.seconds / cached.seconds
        assert plain.mac_reduction == plain.speedup == 1
        latents(pipe, steps=STEPS + 1)
        assert attachment.report().speedup is None


# -- threads and tasks ------------------------------------------------------------------------------------


def test_threads_with_different_specs_on_one_denoiser(pipe: Any) -> None:
    """Step by step in turn, each with a pipeline of its own, while a third enters blocks that need new switches."""
    chosen = [(TGATE, DEEP), ("taylorseer",), ()]
    turns = threading.Barrier(len(chosen))
    found: dict[tuple[str, ...], list[Any]] = {specs: [] for specs in chosen}

    def wait(_: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        turns.wait(60)
        return given

    def draw(attachment: Any, specs: tuple[str, ...]) -> None:
        own = beside(pipe)
        for _ in range(2):
            with attachment.using(specs) as block:
                image = latents(own, callback_on_step_end=wait)
            found[specs].append((image, block.report(), attachment.report()))

    with cachekit.apply(pipe, FORECAST) as attachment:
        with ThreadPoolExecutor(len(chosen)) as pool:
            list(pool.map(functools.partial(draw, attachment), chosen))
        assert torch.equal(latents(pipe), alone(FORECAST))
    for specs, drawn in found.items():
        for image, report, last in drawn:
            assert torch.equal(image, alone(*specs))
            assert report.record is last.record
            assert {count.policy for count in report.counts} == set(specs)


def test_tasks_of_a_server_have_blocks_of_their_own(pipe: Any) -> None:
    """Handlers take turns on one thread, and draw in others."""

    async def handle(attachment: Any, specs: tuple[str, ...]) -> tuple[torch.Tensor, Any]:
        with attachment.using(specs) as block:
            await asyncio.sleep(0)
            image = await asyncio.to_thread(latents, beside(pipe))
        return image, block.report()

    async def serve(attachment: Any) -> list[tuple[torch.Tensor, Any]]:
        return await asyncio.gather(*(handle(attachment, specs) for specs in SPECS))

    with cachekit.apply(pipe, FORECAST) as attachment:
        drawn = asyncio.run(serve(attachment))
    for specs, (image, report) in zip(SPECS, drawn):
        assert torch.equal(image, alone(*specs))
        assert {count.policy for count in report.counts} == set(specs)


# -- what a block needs -----------------------------------------------------------------------------------


def test_a_controlnet_skips_with_a_region_that_a_block_brings() -> None:
    wanted = tiny.controlled()
    with cachekit.apply(wanted, DEEP) as attachment:
        expected, shortened = latents(wanted), attachment.report().record.shortened
    pipe = tiny.controlled()
    with cachekit.apply(pipe, FORECAST) as attachment, attachment.using(DEEP) as block:
        assert torch.equal(latents(pipe), expected)
        assert block.report().record.shortened == shortened > 0


def test_entering_a_block_again_makes_nothing_anew(pipe: Any) -> None:
    with cachekit.apply(pipe, FORECAST) as attachment:
        with attachment.using(TGATE) as first, attachment.using(TGATE) as again:
            assert again.regime is first.regime
        with attachment.using(FORECAST) as applied:
            assert applied.regime is attachment.driver.scopes.applied.regime
