"""After whatever breaks a run, the next one is clean; what is missing is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

import cachekit

STEPS = 5
MAKERS = {"sd": tiny.small, "sdxl": tiny.sdxl, "pixart": tiny.pixart, "svd": tiny.svd}
ALL = ("tgate:m=3,sp_interval=2", "deepcache:interval=2", "adaptive_guidance:m=3,linear=true")
# The run before the fault and the one after it differ in everything.
AFTER = {"steps": 4, "batch": 2, "height": 24, "width": 32}


@functools.cache
def expected() -> torch.Tensor:
    pipe = tiny.small()
    cachekit.apply(pipe, ALL)
    return tiny.latents(pipe, **AFTER)


@functools.cache
def attached() -> Any:
    pipe = tiny.small()
    cachekit.apply(pipe, ALL)
    return pipe


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("broken", range(STEPS))
def test_an_exception_between_steps(broken: int, error: type[BaseException]) -> None:
    pipe = attached()

    def fail(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == broken:
            raise error
        return given

    with pytest.raises(error):
        tiny.latents(pipe, steps=STEPS, callback_on_step_end=fail)
    report = pipe.unet._cachekit_attachment.report()
    assert report.steps == broken + 1
    assert report.record.interrupted
    assert torch.equal(tiny.latents(pipe, **AFTER), expected())
    assert not pipe.unet._cachekit_attachment.report().record.interrupted


@pytest.mark.parametrize(
    "module",
    [
        "conv_in",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "down_blocks.1.resnets.0",
        "up_blocks.1.attentions.2.transformer_blocks.0.attn1",
        "conv_out",
    ],
)
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_an_exception_inside_a_forward(module: str, step: int) -> None:
    pipe = attached()
    attachment = pipe.unet._cachekit_attachment

    def fail(*_: Any) -> None:
        if len(attachment.report().record.rows) > step:
            raise ZeroDivisionError

    handle = pipe.unet.get_submodule(module).register_forward_pre_hook(fail)
    try:
        with pytest.raises(ZeroDivisionError):
            tiny.latents(pipe, steps=STEPS)
    finally:
        handle.remove()
    assert torch.equal(tiny.latents(pipe, **AFTER), expected())


def test_an_exception_before_the_first_step() -> None:
    pipe = attached()
    with pytest.raises(ValueError, match="prompt"):
        pipe()
    assert torch.equal(tiny.latents(pipe, **AFTER), expected())


def test_a_run_stopped_by_the_pipelines_own_flag() -> None:
    pipe = attached()

    def stop(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 2
        return given

    tiny.latents(pipe, steps=STEPS, callback_on_step_end=stop)
    assert pipe.unet._cachekit_attachment.report().steps == 3
    assert torch.equal(tiny.latents(pipe, **AFTER), expected())


@pytest.mark.parametrize("name", MAKERS)
def test_sizes_batches_and_guidance_change_from_run_to_run(name: str) -> None:
    specs = ALL if name != "pixart" else ALL[::2]
    pipe = MAKERS[name]()
    attachment = cachekit.apply(pipe, specs)
    size = 1 if name != "pixart" else pipe.vae_scale_factor
    settings: list[dict[str, Any]] = [
        {"steps": 4, "height": 24 * size, "width": 16 * size},
        {"steps": 3, "guidance": 1.0},
        {"steps": 5, "batch": 1 if name == "svd" else 3},
    ]
    found = [tiny.latents(pipe, **setting) for setting in settings]
    attachment.remove()
    for setting, latents in reversed(list(zip(settings, found))):
        with cachekit.apply(pipe, specs):
            assert torch.equal(tiny.latents(pipe, **setting), latents)


# -- misses -----------------------------------------------------------------------------------------------


def forget(what: Callable[[Any], None], at: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == at:
            what(pipe.unet._cachekit_attachment._state.run)
        return given

    return callback


def missed(pipe: Any) -> int:
    return sum(count.missed for count in pipe.unet._cachekit_attachment.report().counts)


def test_what_is_missing_is_computed() -> None:
    """Without its features DeepCache makes the step a full one: latents as with a full step there."""
    pipe = tiny.small()
    with cachekit.apply(pipe, "deepcache:interval=3"):
        found = tiny.latents(pipe, steps=6, callback_on_step_end=forget(lambda run: run.store.clear(), at=0))
        assert missed(pipe) == 1
    with cachekit.apply(pipe, "deepcache:interval=3,start=1,end=3") as attachment:
        # Full at 0, at 1 where the use starts, reused at 2, full from 3 on.
        assert str(attachment.plan(6)).count("S") >= 1
        partly = tiny.latents(pipe, steps=6)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, partly)


def test_attention_that_is_missing_is_computed() -> None:
    pipe = tiny.small()
    clear = forget(lambda run: run.store.clear(), at=2)
    with cachekit.apply(pipe, "tgate:m=3"):
        found = tiny.latents(pipe, steps=4, callback_on_step_end=clear)
        assert missed(pipe) == 6
    with cachekit.apply(pipe, "null_text:after=3"):
        assert torch.equal(found, tiny.latents(pipe, steps=4))


@pytest.mark.parametrize(
    "change",
    [
        lambda sample: sample[:, :, :8],
        lambda sample: sample.repeat(2, 1, 1, 1),
        lambda sample: sample[:1].repeat(6, 1, 1, 1),
        lambda sample: sample.double(),
    ],
    ids=["shape", "batch of two", "batch of three", "dtype"],
)
@pytest.mark.parametrize("specs", [ALL[:1], ALL[1:2], ALL[2:]], ids="+".join)
def test_nothing_is_reused_across_shapes_and_dtypes(specs: tuple[str, ...], change: Callable[[Any], Any]) -> None:
    """A loop that changes its latents half way gives what a loop that never cached before would give."""
    unet = tiny.small().unet
    table = torch.arange(900, 0, -100)
    text = torch.cat([tiny.text(1, seed=4), tiny.text(1)])
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)

    @torch.no_grad()
    def call(step: int, sample: torch.Tensor, unet: UNet2DConditionModel = unet) -> torch.Tensor:
        given = text.repeat_interleave(len(sample) // 2, dim=0).to(sample.dtype)
        return unet(sample, table[step], given).sample

    changed = change(sample)
    other = tiny.small().unet.to(changed.dtype)
    fresh = call(4, changed, other)
    with cachekit.apply(unet, specs):
        for step in range(4):
            call(step, sample)
        unet.to(changed.dtype)
        found = call(4, changed)
    assert found.shape == fresh.shape
    assert found.dtype == fresh.dtype
    if specs == ALL[1:2]:
        assert torch.equal(found, fresh)
    assert torch.isfinite(found).all()
