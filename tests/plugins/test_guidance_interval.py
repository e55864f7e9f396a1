"""A guidance interval equals a replay by hand to the bit, and diffusers' own way to switch guidance."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler
from support import tiny
from support.comparisons import compared

import cachekit
from cachekit import OPEN, Action, Guidance, PolicyError, SpecError

STEPS = 8
MAKERS = {"sd": tiny.small, "sdxl": tiny.sdxl, "pixart": tiny.pixart, "sd3": tiny.sd3, "wan": tiny.wan}

shared = tiny.sharing(MAKERS)
plain = tiny.uncached(shared, steps=STEPS)


def guided_in(spec: str, name: str) -> list[bool]:
    """Whether each step is guided, worked out from the scheduler alone."""
    keys = dict(item.split("=") for item in spec.partition(":")[2].split(",") if item)
    low, high = (float(keys.get(bound, end)) for bound, end in (("low", "-inf"), ("high", "inf")))
    if not keys:
        low, high = 0.28, 5.42
    scheduler = type(shared(name).scheduler).from_config(shared(name).scheduler.config)
    if name == "sd3" or name == "wan":
        scheduler.set_timesteps(STEPS, **({"mu": 0.5} if scheduler.config.use_dynamic_shifting else {}))
        noise = [float(sigma / (1 - sigma)) for sigma in scheduler.sigmas[:STEPS].double()]
    else:
        scheduler.set_timesteps(STEPS)
        cumulative = scheduler.alphas_cumprod.double()
        noise = [float(((1 - cumulative[int(t)]) / cumulative[int(t)]).sqrt()) for t in scheduler.timesteps]
    places = scheduler.timesteps.tolist() if keys.get("axis") == "timestep" else noise
    first, stop = int(keys.get("first", 0)), int(keys.get("stop", STEPS))
    return [first <= step < stop and low < place <= high for step, place in enumerate(places)]


def replayed(name: str, guided: list[bool]) -> torch.Tensor:
    """Run the conditional half alone in steps that are not guided, and give its output for both."""
    pipe = MAKERS[name]()
    denoiser = tiny.denoiser_of(pipe)
    forward, separate = denoiser.forward, name == "wan"
    state: dict[str, Any] = {"call": -1}

    def call(*args: Any, **kwargs: Any) -> Any:
        state["call"] += 1
        step, branch = divmod(state["call"], 2) if separate else (state["call"], 0)
        if separate:  # the conditional branch is called first
            if branch == 0 or guided[step]:
                state["output"] = forward(*args, **kwargs)
            return state["output"]
        if guided[step]:
            return forward(*args, **kwargs)
        return tuple(torch.cat([one] * 2) for one in forward(*tiny.cut(args, 1), **tiny.cut(kwargs, 1)))

    denoiser.forward = call
    return tiny.latents(pipe, steps=STEPS)


SPECS = [
    "guidance_interval",
    "guidance_interval:low=0.5,high=3",
    "guidance_interval:first=2,stop=5",
    "guidance_interval:axis=timestep,low=200,high=700",
]


@compared("guidance_interval", "a replay", MAKERS)
@pytest.mark.parametrize(
    ("name", "spec"), [*(("sd", spec) for spec in SPECS), *((name, SPECS[0]) for name in MAKERS if name != "sd")]
)
def test_latents_are_those_of_a_replay(name: str, spec: str) -> None:
    guided = guided_in(spec, name)
    assert len(set(guided)) == 2
    wanted = replayed(name, guided)
    for _ in range(2):
        with cachekit.apply(shared(name), spec) as attachment:
            assert torch.equal(tiny.latents(shared(name), steps=STEPS), wanted)
            report = attachment.report()
        assert torch.equal(tiny.latents(shared(name), steps=STEPS), plain(name))
    assert not torch.equal(wanted, plain(name))
    assert [len(row.branches) == 2 for row in report.record.rows] == guided
    (count,) = report.counts
    assert (count.computed, count.reused, count.missed) == (guided.count(True), guided.count(False), 0)
    assert report.macs < report.baseline_macs


@compared("guidance_interval", "a callback that switches guidance", ["small"])
@pytest.mark.parametrize(("first", "stop"), [(0, 3), (0, 1), (1, 5)])
def test_latents_are_those_of_a_callback_that_switches_guidance(first: int, stop: int) -> None:
    """The pipeline's own guidance, ended and begun again between its steps."""
    pipe = tiny.small()
    whole = torch.cat([tiny.text(1, seed=4), tiny.text(1)])

    def switch(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        is_guided = first <= step + 1 < stop
        pipe._guidance_scale = 5.0 if is_guided else 0.0
        return {"prompt_embeds": whole if is_guided else whole[1:]}

    with cachekit.apply(shared("sd"), f"guidance_interval:first={first},stop={stop}"):
        found = tiny.latents(shared("sd"), steps=STEPS)
    if first:  # the first step has no callback before it: only the prompt of the conditional branch is given
        forward = pipe.unet.forward
        pipe.unet.forward = functools.partial(unguided_at_first, forward, {"call": 0})
    wanted = tiny.latents(
        pipe, steps=STEPS, callback_on_step_end=switch, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    )
    assert torch.equal(found, wanted)


def unguided_at_first(forward: Callable[..., Any], state: dict[str, int], *args: Any, **kwargs: Any) -> Any:
    state["call"] += 1
    if state["call"] > 1:
        return forward(*args, **kwargs)
    return tuple(torch.cat([one] * 2) for one in forward(*tiny.cut(args, 1), **tiny.cut(kwargs, 1)))


def test_the_noise_level_is_the_same_for_another_scheduler_with_the_same_timesteps() -> None:
    pipe, other = tiny.small(), tiny.small()
    other.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config, timestep_spacing="leading")
    plans = []
    for one in (pipe, other):
        with cachekit.apply(one, "guidance_interval") as attachment:
            plans.append([len(row.branches) for row in attachment.plan(STEPS).rows])
    assert plans[0] == plans[1]


def test_a_plan_without_a_scheduler_is_open_and_steps_alone_are_not() -> None:
    unet = tiny.small().unet
    with cachekit.apply(unet, "guidance_interval:first=2,low=0.3") as attachment:
        assert [row.actions[0] for row in attachment.plan(4).rows] == [Action.REUSE, Action.REUSE, OPEN, OPEN]
    with cachekit.apply(unet, "guidance_interval:first=1,stop=3") as attachment:
        assert attachment.plan(4).is_static


def test_a_scheduler_that_shows_no_noise_level_is_refused_and_leaves_the_pipeline_usable() -> None:
    pipe = tiny.small()
    pipe.scheduler = EDMEulerScheduler()
    uncached = tiny.latents(pipe, steps=3)
    with cachekit.apply(pipe, "guidance_interval") as attachment:
        with pytest.raises(PolicyError, match=r"guidance_interval: no noise is known at step 0; give .* first="):
            tiny.latents(pipe, steps=3)
        with attachment.paused():
            assert torch.equal(tiny.latents(pipe, steps=3), uncached)
    with cachekit.apply(pipe, "guidance_interval:stop=1"):
        assert not torch.equal(tiny.latents(pipe, steps=3), uncached)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ("low=3,high=2", "low must be below high; they bound the guided steps"),
        ("first=3,stop=3", "stop must be above first; guidance ends before step stop"),
        ("axis=timestep", "axis=timestep needs low, high or both; give the timesteps between which to guide"),
        ("axis=time,low=3", "axis=time"),
    ],
)
def test_what_is_refused(keys: str, reason: str) -> None:
    with pytest.raises(SpecError, match=re.escape(reason)) as error:
        cachekit.apply(shared("sd"), f"guidance_interval:{keys}")
    assert "\n" not in str(error.value)


def test_the_conditional_branch_stays() -> None:
    (choice,) = cachekit.policies()["guidance_interval"]().choices().values()
    assert choice.where == Guidance(keep="cond")
