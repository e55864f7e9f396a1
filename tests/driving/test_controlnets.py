"""A ControlNet leaves out what the denoiser's next call would throw away, and nothing else."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, HeunDiscreteScheduler, StableDiffusionControlNetPipeline
from support import tiny
from torch import nn

import cachekit

STEPS = 6


def nets(pipe: StableDiffusionControlNetPipeline) -> list[nn.Module]:
    return list(getattr(pipe.controlnet, "nets", [pipe.controlnet]))


latents = functools.partial(tiny.latents, steps=STEPS)


@contextmanager
def batches(module: nn.Module) -> Iterator[list[int]]:
    """Note the batch of each call of a module."""
    seen: list[int] = []
    hook = module.register_forward_hook(lambda _, args, output: seen.append(len(args[0])), prepend=True)
    yield seen
    hook.remove()


def plain(attachment: cachekit.Attachment) -> cachekit.Attachment:
    """Put back what shortens the calls of ControlNets, so that they run in full."""
    attachment._interceptors.uninstall()
    return attachment


def layers(net: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    return net.down_blocks[0].resnets[0], net.down_blocks[1].resnets[0], net.mid_block.resnets[0]


@pytest.mark.parametrize(("branch", "first"), [(0, 2), (1, 6)])
@pytest.mark.parametrize("count", [1, 2])
def test_what_a_shallow_step_throws_away_is_not_computed(count: int, branch: int, first: int) -> None:
    pipe = tiny.controlled(count)
    without = latents(pipe)
    for net in nets(pipe):
        with cachekit.apply(pipe, f"deepcache:interval=3,branch={branch}"):
            noted = [batches(layer) for layer in layers(net)]
            with noted[0] as shallow, noted[1] as deep, noted[2] as middle:
                cached = latents(pipe)
        assert (len(shallow), len(deep), len(middle)) == (first, 2, 2)
    with plain(cachekit.apply(pipe, f"deepcache:interval=3,branch={branch}")):
        assert torch.equal(latents(pipe), cached)
    assert not torch.equal(cached, without)
    assert torch.equal(latents(pipe), without)


@pytest.mark.parametrize("specs", [["tgate:m=3"], ["tgate:m=3", "deepcache:interval=2"]], ids="+".join)
def test_the_dropped_branch_is_not_computed(specs: list[str]) -> None:
    pipe = tiny.controlled()
    with plain(cachekit.apply(pipe, specs)):
        wanted = latents(pipe)
    with cachekit.apply(pipe, specs) as attachment, batches(pipe.controlnet) as seen:
        found = latents(pipe)
        assert torch.equal(latents(pipe), found)
    narrowed_or_shallow = 3 if len(specs) == 1 else 4
    assert f"ControlNet: {narrowed_or_shallow} calls skipped outputs" in str(attachment.report())
    assert seen == [2, 2, 2, 1, 1, 1] * 2
    assert torch.allclose(found, wanted, atol=1e-3)  # half a batch is computed in another order


def test_a_branch_dropped_by_a_decision_of_the_run() -> None:
    pipe = tiny.controlled()
    with cachekit.apply(pipe, "adaptive_guidance:threshold=-1.0") as attachment, batches(pipe.controlnet) as seen:
        latents(pipe)
    branches = [len(row.branches) for row in attachment.report().record.rows]
    assert seen == branches
    assert {1, 2} == set(branches)


def test_guess_mode_runs_in_full() -> None:
    pipe = tiny.controlled()
    specs = ["tgate:m=3", "deepcache:interval=2"]
    with plain(cachekit.apply(pipe, specs)):
        wanted = latents(pipe, guess_mode=True)
    with cachekit.apply(pipe, specs), batches(pipe.controlnet) as seen:
        assert torch.equal(latents(pipe, guess_mode=True), wanted)
    assert seen == [1] * STEPS


def test_a_batch_that_the_pipeline_cuts_is_followed() -> None:
    def cut(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:  # the next step would have reused deep features of both branches
            pipe._guidance_scale = 0.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    pipe, arguments = tiny.controlled(), {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    image = {"image": tiny.picture(), "guess_mode": True}  # the image of guided steps has both halves for good
    with plain(cachekit.apply(pipe, "deepcache:interval=4")):
        wanted = latents(pipe, callback_on_step_end=cut, **arguments, **image)
    with cachekit.apply(pipe, "deepcache:interval=4"):
        assert torch.equal(latents(pipe, callback_on_step_end=cut, **arguments, **image), wanted)


def test_guidance_that_begins_in_mid_run_is_followed() -> None:
    """In guess mode the ControlNet's batch is the same before and after: it does not show the change."""

    def begin(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 2:
            pipe._guidance_scale = 5.0
            given["prompt_embeds"] = torch.cat([tiny.text(1, seed=4), tiny.text(1)])
        return given

    pipe = tiny.controlled()
    changes = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "guess_mode": True, "guidance": 1.0}
    with plain(cachekit.apply(pipe, "deepcache:interval=5")):
        wanted = latents(pipe, callback_on_step_end=begin, **changes)
    with cachekit.apply(pipe, "deepcache:interval=5"), batches(pipe.controlnet.mid_block) as middle:
        assert torch.equal(latents(pipe, callback_on_step_end=begin, **changes), wanted)
    assert len(middle) == 4  # unguided: the first of three; guided: all, as the batches differ


@pytest.mark.parametrize("bad", range(STEPS))
def test_features_that_are_lost_bring_the_controlnet_back(bad: int) -> None:
    """What is not finite is not kept: the next step computes, and needs every residual."""
    pipe = tiny.controlled()
    specs = ["deepcache:interval=3", "adaptive_guidance:m=4,linear=true"]

    def spoiled() -> torch.Tensor:
        calls = 0

        def spoil(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return output * float("nan") if calls == bad + 1 else output

        hook = pipe.unet.up_blocks[0].register_forward_hook(spoil)
        found = latents(pipe)
        hook.remove()
        return found

    with plain(cachekit.apply(pipe, specs)):
        wanted = spoiled()
    with cachekit.apply(pipe, specs):
        assert torch.allclose(spoiled(), wanted, atol=1e-3, equal_nan=True)


def test_a_scheduler_that_calls_twice_a_step() -> None:
    pipe = tiny.controlled()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    specs = ["tgate:m=3", "deepcache:interval=2"]
    with plain(cachekit.apply(pipe, specs)):
        wanted = latents(pipe)
    with cachekit.apply(pipe, specs), batches(pipe.controlnet.mid_block) as middle:
        assert torch.allclose(latents(pipe), wanted, atol=1e-3)
    assert len(middle) < 2 * STEPS - 1


def test_an_error_within_leaves_the_next_run_clean() -> None:
    pipe = tiny.controlled()
    with cachekit.apply(pipe, ["tgate:m=3", "deepcache:interval=2"]):
        wanted = latents(pipe)
        for step in range(STEPS):
            calls = 0

            def fail(module: nn.Module, args: Any, output: Any, step: int = step) -> None:
                nonlocal calls
                calls += 1
                if calls == step + 1:
                    raise KeyboardInterrupt

            hook = pipe.controlnet.controlnet_mid_block.register_forward_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                latents(pipe)
            hook.remove()
            assert torch.equal(latents(pipe), wanted)


def test_undone_the_controlnet_is_as_before() -> None:
    pipe = tiny.controlled(2)
    before = [tiny.state_of(net) for net in nets(pipe)]
    without = latents(pipe)
    cachekit.apply(pipe, "deepcache:interval=2")
    assert [tiny.state_of(net) for net in nets(pipe)] != before
    latents(pipe)
    cachekit.remove(pipe)
    assert [tiny.state_of(net) for net in nets(pipe)] == before
    assert torch.equal(latents(pipe), without)


def test_a_deep_copy_skips_on_its_own() -> None:
    pipe = tiny.controlled()
    without = latents(pipe)
    cachekit.apply(pipe, "deepcache:interval=3")
    cached = latents(pipe)
    twin = copy.deepcopy(pipe)
    cachekit.remove(pipe)
    with batches(twin.controlnet.mid_block) as middle, batches(pipe.controlnet.mid_block) as original:
        assert torch.equal(latents(twin), cached)
    assert (len(middle), len(original)) == (2, 0)
    cachekit.remove(twin)
    assert torch.equal(latents(twin), without)
    assert torch.equal(latents(pipe), without)


def test_a_copied_denoiser_brings_no_controlnet() -> None:
    pipe = tiny.controlled()
    with cachekit.apply(pipe, "deepcache:interval=3") as attachment:
        memo: dict[int, Any] = {}
        copy.deepcopy(pipe.unet, memo)
        assert not any(id(parameter) in memo for parameter in pipe.controlnet.parameters())
        assert [type(one._module) for one in attachment._interceptors._joined] == [ControlNetModel]


def test_a_controlnet_copied_alone_runs_in_full() -> None:
    pipe = tiny.controlled()
    with plain(cachekit.apply(pipe, "deepcache:interval=3")):
        wanted = latents(pipe)
    with cachekit.apply(pipe, "deepcache:interval=3"):
        memo: dict[int, Any] = {}
        twin = copy.deepcopy(pipe.controlnet, memo)
        assert not any(id(parameter) in memo for parameter in pipe.unet.parameters())
        pipe.controlnet = twin
        with batches(twin.mid_block) as middle:
            assert torch.equal(latents(pipe), wanted)
    assert len(middle) == STEPS


def test_pickling_a_controlnet_of_an_attached_pipeline_says_what_to_do() -> None:
    pipe = tiny.controlled()
    with cachekit.apply(pipe, "deepcache:interval=3"), pytest.raises(cachekit.CachekitError, match="call cachekit"):
        pickle.dumps(pipe.controlnet)
    pickle.dumps(pipe.controlnet)


def test_a_block_shared_with_the_denoiser_stays_the_denoisers() -> None:
    pipe = tiny.controlled()
    pipe.controlnet.mid_block = pipe.unet.mid_block
    without = latents(pipe)
    with plain(cachekit.apply(pipe, "deepcache:interval=3")):
        wanted = latents(pipe)
    with cachekit.apply(pipe, "deepcache:interval=3"):
        assert torch.equal(latents(pipe), wanted)
    assert torch.equal(latents(pipe), without)


def test_a_controlnet_that_replaces_another_runs_in_full() -> None:
    pipe, other = tiny.controlled(), tiny.controlled(2)
    with cachekit.apply(pipe, "deepcache:interval=3"):
        pipe.controlnet = nets(other)[1]
        with batches(pipe.controlnet.mid_block) as middle:
            replaced = latents(pipe)
    assert len(middle) == STEPS
    with cachekit.apply(pipe, "deepcache:interval=3"):
        assert torch.equal(latents(pipe), replaced)
