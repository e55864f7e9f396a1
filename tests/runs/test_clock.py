"""Steps and runs are told apart for every scheduler, with a pipeline and without."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from support import tiny

import cachekit
from cachekit.runs.clock import mark_of
from cachekit.upstream.pipelines import denoiser_of

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ddim": DDIMScheduler.from_config,
    "euler": EulerDiscreteScheduler.from_config,
    "euler_ancestral": EulerAncestralDiscreteScheduler.from_config,
    "dpm": DPMSolverMultistepScheduler.from_config,
    "dpm_karras": functools.partial(DPMSolverMultistepScheduler.from_config, use_karras_sigmas=True),
    "pndm": functools.partial(PNDMScheduler.from_config, skip_prk_steps=True),
    "heun": HeunDiscreteScheduler.from_config,
    "kdpm2": KDPM2DiscreteScheduler.from_config,
    "unipc": UniPCMultistepScheduler.from_config,
    "lcm": LCMScheduler.from_config,
}
BOTH = ("tgate:m=4", "deepcache:interval=3")
STEPS = 6


@functools.cache
def shared(name: str) -> Any:
    return {"sd": tiny.small, "sdxl": tiny.sdxl, "pixart": tiny.pixart, "dit": tiny.dit}[name]()


def scheduled(name: str, scheduler: str) -> Any:
    pipe = shared(name)
    pipe.scheduler = SCHEDULERS[scheduler](pipe.scheduler.config)
    return pipe


def fresh(scheduler: str, specs: Iterable[str] = BOTH) -> Any:
    pipe = tiny.small()
    pipe.scheduler = SCHEDULERS[scheduler](pipe.scheduler.config)
    cachekit.apply(pipe, specs)
    return pipe


class Batches:
    """Write down the batch of every call of some modules."""

    def __init__(self, denoiser: torch.nn.Module, *names: str) -> None:
        self.seen: dict[str, list[int]] = {name: [] for name in names}
        self.handles = [denoiser.get_submodule(name).register_forward_hook(self.note(name)) for name in names]

    def note(self, name: str) -> Any:
        return lambda module, args, output: self.seen[name].append(output.shape[0])

    def __enter__(self) -> dict[str, list[int]]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def latents_and_iterations(pipe: Any, **changes: Any) -> tuple[torch.Tensor, int]:
    steps: list[int] = []

    def note(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return given

    if type(pipe).__name__ in ("DiTPipeline", "PixArtAlphaPipeline"):  # these have no such callback
        return tiny.latents(pipe, **changes), len(pipe.scheduler.timesteps)
    return tiny.latents(pipe, **changes, callback_on_step_end=note), len(steps)


# -- a pipeline's loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_rows_are_the_iterations_and_policies_fire_on_time(scheduler: str) -> None:
    pipe = scheduled("sd", scheduler)
    without, iterations = latents_and_iterations(pipe, steps=STEPS)
    with cachekit.apply(pipe, BOTH) as attachment, Batches(pipe.unet, "conv_in", "mid_block.resnets.0.conv1") as seen:
        first = tiny.latents(pipe, steps=STEPS)
        record = attachment.report().record
        planned = attachment.plan(STEPS).rows
        again = tiny.latents(pipe, steps=STEPS)
    assert len(record.rows) == record.steps == iterations
    assert seen["conv_in"][:iterations] == [2] * 4 + [1] * (iterations - 4)
    # Full at 0, at 3 where the gate keeps, and every third step from the gate at 4 on.
    assert seen["mid_block.resnets.0.conv1"] == 2 * ([2, 2] + [1] * len(range(4, iterations, 3)))
    assert [row.actions for row in record.rows] == [row.actions for row in planned]
    assert torch.equal(first, again)
    assert not torch.equal(first, without)
    assert torch.equal(tiny.latents(pipe, steps=STEPS), without)


@pytest.mark.parametrize("scheduler", ["pndm", "heun", "kdpm2"])
def test_repeated_timesteps_are_steps_of_their_own(scheduler: str) -> None:
    pipe = scheduled("sd", scheduler)
    _, iterations = latents_and_iterations(pipe, steps=STEPS)
    assert iterations > STEPS
    with cachekit.apply(pipe, "deepcache:interval=2") as attachment, Batches(pipe.unet, "mid_block.resnets.0") as seen:
        tiny.latents(pipe, steps=STEPS)
    assert len(seen["mid_block.resnets.0"]) == -(-iterations // 2)
    assert attachment.report().steps == iterations


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [("sdxl", "heun"), ("sdxl", "lcm"), ("pixart", "dpm"), ("pixart", "heun"), ("dit", "dpm"), ("dit", "euler")],
)
def test_other_pipelines_count_their_steps_too(name: str, scheduler: str) -> None:
    pipe = scheduled(name, scheduler)
    root = "pos_embed.proj" if name in ("pixart", "dit") else "conv_in"
    without, iterations = latents_and_iterations(pipe, steps=5)
    with (
        cachekit.apply(pipe, "adaptive_guidance:m=3") as attachment,
        Batches(denoiser_of(pipe), root) as seen,
    ):
        tiny.latents(pipe, steps=5)
        assert attachment.report().steps == iterations
    assert seen[root] == [2] * 3 + [1] * (iterations - 3)
    assert torch.equal(tiny.latents(pipe, steps=5), without)


@pytest.mark.parametrize("scheduler", ["heun", "pndm", "euler_ancestral"])
def test_a_scheduler_replaced_after_apply_is_followed(scheduler: str) -> None:
    pipe = fresh("ddim")
    tiny.latents(pipe, steps=3)
    pipe.scheduler = SCHEDULERS[scheduler](pipe.scheduler.config)
    assert torch.equal(tiny.latents(pipe, steps=STEPS), tiny.latents(fresh(scheduler), steps=STEPS))


def test_runs_of_different_length_follow_each_other() -> None:
    pipe = fresh("dpm")
    found = {steps: tiny.latents(pipe, steps=steps) for steps in (5, 9, 1, 7)}
    for steps in (1, 5, 9):
        assert torch.equal(tiny.latents(fresh("dpm"), steps=steps), found[steps])


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "heun", "pndm"])
def test_image_to_image_strengths_on_one_attached_pipeline(scheduler: str) -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def attached() -> Any:
        pipe = StableDiffusionImg2ImgPipeline(**scheduled("sd", scheduler).components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe, cachekit.apply(pipe, ("tgate:m=2", "deepcache:interval=2"))

    def draw(pipe: Any, strength: float) -> tuple[torch.Tensor, int]:
        return latents_and_iterations(pipe, steps=10, image=image, strength=strength)

    pipe, attachment = attached()
    found = {}
    for strength in (0.8, 0.3, 1.0, 0.3):
        found[strength], iterations = draw(pipe, strength)
        assert attachment.report().steps == attachment.report().record.steps == iterations
    attachment.remove()
    for strength, latents in found.items():
        pipe, attachment = attached()
        with attachment:
            assert torch.equal(draw(pipe, strength)[0], latents)


# -- a bare sampling loop ---------------------------------------------------------------------------------

TEXT = torch.cat([tiny.text(1, seed=4), tiny.text(1)])
NOISE = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def bare(
    unet: Any,
    scheduler: Any,
    timesteps: Iterable[Any],
    *,
    guided: bool = True,
    batch: int = 1,
    stop: int = 99,
    given_as: Callable[[Any], Any] = lambda t: t,
) -> torch.Tensor:
    latents = NOISE[:batch] * scheduler.init_noise_sigma
    text = torch.cat([TEXT[:1]] * batch + [TEXT[1:]] * batch)
    for step, t in enumerate(timesteps):
        if step == stop:
            break
        sample = scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
        output = unet(sample, given_as(t), encoder_hidden_states=text if guided else text[batch:]).sample
        if guided:
            u, c = output.chunk(2)
            output = u + 5.0 * (c - u)
        latents = scheduler.step(output, t, latents).prev_sample
    return latents


def timesteps_of(scheduler: Any, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    return scheduler.timesteps


@pytest.mark.parametrize("attach_to_pipeline", [True, False])
@pytest.mark.parametrize("scheduler", ["ddim", "heun", "pndm", "dpm", "unipc"])
def test_a_bare_loop_equals_the_pipeline(scheduler: str, attach_to_pipeline: bool) -> None:
    pipe = scheduled("sd", scheduler)
    with cachekit.apply(pipe, BOTH):
        expected = tiny.latents(pipe, steps=STEPS, latents=NOISE[:1])
    with cachekit.apply(pipe if attach_to_pipeline else pipe.unet, BOTH) as attachment:
        for _ in range(2):
            found = bare(pipe.unet, pipe.scheduler, timesteps_of(pipe.scheduler, STEPS))
            assert torch.equal(found, expected)
            assert attachment.report().steps == len(pipe.scheduler.timesteps)


@pytest.mark.parametrize("attach_to_pipeline", [True, False])
def test_unguided_bare_loops_of_other_sizes_follow_each_other(attach_to_pipeline: bool) -> None:
    pipe = scheduled("sd", "ddim")
    settings = [(6, True, 1), (5, False, 2), (6, False, 1), (7, True, 2), (6, True, 1)]

    def run(steps: int, guided: bool, batch: int) -> torch.Tensor:
        timesteps = timesteps_of(pipe.scheduler, steps)
        return bare(pipe.unet, pipe.scheduler, timesteps, guided=guided, batch=batch)

    with cachekit.apply(pipe if attach_to_pipeline else pipe.unet, BOTH):
        together = [run(*setting) for setting in settings]
    for setting, found in zip(settings, together):
        with cachekit.apply(pipe if attach_to_pipeline else pipe.unet, BOTH):
            assert torch.equal(run(*setting), found)


@pytest.mark.parametrize(("new_table", "first"), [(True, 0), (True, 5), (False, 0)])
@pytest.mark.parametrize("attach_to_pipeline", [True, False])
def test_an_interrupted_bare_loop_leaves_nothing_to_the_next(
    attach_to_pipeline: bool, new_table: bool, first: int
) -> None:
    """The next loop may begin below the timestep reached, as image-to-image does."""
    pipe = scheduled("sd", "ddim")
    timesteps = timesteps_of(pipe.scheduler, 9)

    def run(stop: int = 99, begin: int = 0) -> torch.Tensor:
        return bare(pipe.unet, pipe.scheduler, list(timesteps)[begin:], stop=stop)

    with cachekit.apply(pipe if attach_to_pipeline else pipe.unet, BOTH):
        expected = run(begin=first)
    with cachekit.apply(pipe if attach_to_pipeline else pipe.unet, BOTH):
        run(stop=3)
        if new_table:
            timesteps = timesteps_of(pipe.scheduler, 9)
        assert torch.equal(run(begin=first), expected)


@pytest.mark.parametrize("attach_to_pipeline", [True, False])
@pytest.mark.parametrize("given_as", [int, float, torch.clone, lambda t: t.reshape(1).repeat(2)])
def test_timesteps_without_a_table(given_as: Callable[[Any], Any], attach_to_pipeline: bool) -> None:
    """The number of steps is not known then; the policies still do their work."""
    pipe = scheduled("sd", "ddim")
    with cachekit.apply(pipe, BOTH):
        expected = bare(pipe.unet, pipe.scheduler, timesteps_of(pipe.scheduler, STEPS))
    with cachekit.apply(pipe if attach_to_pipeline else pipe.unet, BOTH) as attachment:
        for _ in range(2):
            timesteps = timesteps_of(pipe.scheduler, STEPS)
            assert torch.equal(bare(pipe.unet, pipe.scheduler, timesteps, given_as=given_as), expected)
            assert attachment.report().steps == STEPS


def test_several_calls_belong_to_one_step() -> None:
    pipe = scheduled("sd", "ddim")
    timesteps = timesteps_of(pipe.scheduler, STEPS)
    sample = torch.cat([NOISE[:1]] * 2)
    with cachekit.apply(pipe, BOTH) as attachment, Batches(pipe.unet, "conv_in", "mid_block.resnets.0") as seen:
        with torch.no_grad():
            for t in timesteps:
                for _ in range(3):
                    pipe.unet(sample, t, TEXT)
        assert attachment.report().steps == STEPS
        assert attachment.report().calls == 3 * STEPS
    assert seen["conv_in"] == [2] * 12 + [1] * 6
    assert seen["mid_block.resnets.0"] == [2] * 6 + [1] * 3


def test_a_step_is_told_by_all_frames_timesteps() -> None:
    """One frame that is given, and not denoised, has the same timestep in all steps."""
    steps = [torch.tensor([[20.0, time, time]]) for time in (999.3, 800.1)]
    first, second = (mark_of(step, None) for step in steps)
    assert not first.same_step(second)
    assert first.same_step(mark_of(steps[0].repeat(2, 1), None))
    uniform = torch.full((1, 7), 999.3)
    assert mark_of(uniform, None).same_step(mark_of(torch.full((2, 3), 999.3), None))
    assert first.begins_after(second)
    assert not second.begins_after(first)


def test_separate_calls_of_a_step_reuse_their_own_features() -> None:
    """Branches that come in calls of their own must not hand features to each other."""
    pipe = scheduled("sd", "ddim")

    @torch.no_grad()
    def predictions() -> list[torch.Tensor]:
        timesteps = timesteps_of(pipe.scheduler, 4)
        return [pipe.unet(NOISE[:1], t, text).sample for t in timesteps for text in (TEXT[:1], TEXT[1:])]

    def alone(text: torch.Tensor) -> list[torch.Tensor]:
        with cachekit.apply(pipe, "deepcache:interval=2"), torch.no_grad():
            return [pipe.unet(NOISE[:1], t, text).sample for t in timesteps_of(pipe.scheduler, 4)]

    with cachekit.apply(pipe, "deepcache:interval=2"):
        found = predictions()
    for branch, text in enumerate((TEXT[:1], TEXT[1:])):
        for one, other in zip(found[branch::2], alone(text)):
            assert torch.equal(one, other)
