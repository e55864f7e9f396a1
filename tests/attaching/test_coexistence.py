"""Whatever else changes a denoiser or its inputs keeps working under every policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from DeepCache import DeepCacheSDHelper
from diffusers import (
    StableDiffusionAdapterPipeline,
    StableDiffusionInstructPix2PixPipeline,
    T2IAdapter,
)
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from support import tiny

import cachekit
from cachekit.errors import GuidanceError

STEPS = 5
POLICIES = [
    ("tgate:m=3",),
    ("tgate:m=3,sp_interval=2,fi_interval=2",),
    ("deepcache:interval=2",),
    ("adaptive_guidance:m=2",),
    ("adaptive_guidance:m=2,linear=true",),
    ("null_text:after=3",),
    ("tgate:m=3", "deepcache:interval=2,branch=1", "adaptive_guidance:threshold=1.0"),
]


# -- pipelines that add something -------------------------------------------------------------------------


def with_controlnet() -> tuple[Any, dict[str, Any]]:
    return tiny.controlled(), {"image": tiny.picture()}


def with_controlnets() -> tuple[Any, dict[str, Any]]:
    """Two of them, of which one serves some steps only."""
    window = {"control_guidance_start": [0.0, 0.2], "control_guidance_end": [1.0, 0.7]}
    return tiny.controlled(2), {"controlnet_conditioning_scale": [1.0, 0.5], **window}


def guessing() -> tuple[Any, dict[str, Any]]:
    """One that is called for one of two branches."""
    pipe, given = with_controlnet()
    return pipe, {**given, "guess_mode": True}


@tiny.reproducible
def with_t2i_adapter() -> tuple[Any, dict[str, Any]]:
    parts = {key: value for key, value in tiny.small().components.items() if key != "image_encoder"}
    adapter = T2IAdapter(in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=2)
    pipe = StableDiffusionAdapterPipeline(**parts, adapter=tiny.seeded(adapter, 1), requires_safety_checker=False)
    return pipe, {"image": tiny.picture(), "height": 32, "width": 32}


@tiny.reproducible
def with_ip_adapter(count: int = 1) -> tuple[Any, dict[str, Any]]:
    pipe = tiny.small()
    weights, sizes = {}, pipe.unet.config.block_out_channels
    names = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for place, name in enumerate(names):
        block, number = name.split(".")[0], int(name.split(".")[1]) if name[:3] != "mid" else -1
        hidden = sizes[::-1][number] if block == "up_blocks" else sizes[number]
        added = IPAdapterAttnProcessor2_0(hidden_size=hidden, cross_attention_dim=tiny.WIDTH, scale=1.0).state_dict()
        for key in ("to_k_ip", "to_v_ip"):
            weights[f"{2 * place + 1}.{key}.weight"] = added[f"{key}.0.weight"]
    projection = ImageProjection(image_embed_dim=6, cross_attention_dim=tiny.WIDTH, num_image_text_embeds=4)
    renamed = {key.replace("image_embeds", "proj"): value for key, value in projection.state_dict().items()}
    pipe.unet._load_ip_adapter_weights([{"image_proj": renamed, "ip_adapter": weights}] * count)
    embeds = [torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(3 + place)) for place in range(count)]
    return pipe, {"ip_adapter_image_embeds": embeds}


def with_masks() -> tuple[Any, dict[str, Any]]:
    """As many masks as the batch has branches: one for each of two adapters."""
    pipe, given = with_ip_adapter(2)
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, ..., :16] = 1
    masks[1, ..., 16:] = 1
    return pipe, {**given, "cross_attention_kwargs": {"ip_adapter_masks": masks}}


EXTRAS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "controlnet": with_controlnet,
    "controlnets": with_controlnets,
    "controlnet that guesses": guessing,
    "t2i_adapter": with_t2i_adapter,
    "ip_adapter": with_ip_adapter,
    "ip_adapter with masks": with_masks,
}


def latents(made: tuple[Any, dict[str, Any]], steps: int = STEPS) -> torch.Tensor:
    pipe, extra = made
    pipe.set_progress_bar_config(disable=True)
    return tiny.latents(pipe, steps=steps, **extra)


@pytest.mark.parametrize("name", EXTRAS)
def test_every_policy_works_and_is_undone(name: str) -> None:
    made = EXTRAS[name]()
    without = latents(made)
    seen = []
    for specs in POLICIES:
        with cachekit.apply(made[0], specs) as attachment:
            first = latents(made)
            assert sum(count.missed for count in attachment.report().counts) == 0
        assert not any(torch.equal(first, other) for other in [without, *seen])
        seen.append(first)
    assert torch.equal(latents(made), without)
    # The addition matters, and is not merely carried along.
    assert not torch.allclose(without, tiny.latents(tiny.small(), steps=STEPS), atol=0.1)


@pytest.mark.parametrize(
    ("spec", "half", "gated"),
    [("adaptive_guidance:m=3", 1, False), ("null_text:after=3", 0, False), ("tgate:m=3", 0, True)],
)
@pytest.mark.parametrize("name", EXTRAS)
def test_additions_are_narrowed_as_by_hand(name: str, spec: str, half: int, gated: bool) -> None:
    made, (pipe, extra) = EXTRAS[name](), EXTRAS[name]()
    with cachekit.apply(made[0], spec):
        found = latents(made)
    by_hand = latents((tiny.narrowed_by_hand(pipe, 3, half, gated), extra))
    # A ControlNet is narrowed as well, and half a batch is computed in another order.
    assert torch.allclose(found, by_hand, atol=1e-3) if "controlnet" in name else torch.equal(found, by_hand)


@pytest.mark.parametrize("branch", [0, 1, 4])
@pytest.mark.parametrize("name", EXTRAS)
def test_additions_with_deepcache_equal_the_published_helper(name: str, branch: int) -> None:
    made, theirs = EXTRAS[name](), EXTRAS[name]()
    helper = DeepCacheSDHelper(pipe=theirs[0])
    helper.set_params(cache_interval=2, cache_branch_id=branch)
    helper.enable()
    with cachekit.apply(made[0], f"deepcache:interval=2,branch={branch}"):
        assert torch.equal(latents(made), latents(theirs))


# -- attention processors ---------------------------------------------------------------------------------


class CountingProcessor(AttnProcessor2_0):
    """Count the calls, and change the result so that bypassing it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        return super().__call__(*args, **kwargs) * 1.5


@pytest.mark.parametrize("before_apply", [True, False])
def test_custom_attention_processors_are_called(before_apply: bool) -> None:
    pipe = tiny.small()
    processors = {name: CountingProcessor() for name in pipe.unet.attn_processors}
    plain_processors = dict(pipe.unet.attn_processors)
    if before_apply:
        pipe.unet.set_attn_processor(dict(processors))
    with cachekit.apply(pipe, "tgate:m=3,sp_interval=2"):
        pipe.unet.set_attn_processor(dict(processors))
        found = tiny.latents(pipe, steps=6)
    calls = {name: processor.calls for name, processor in processors.items()}
    # Self-attention is kept at 0 and 2 and computed from the gate at 3 on; cross-attention in the first three.
    assert calls == {name: 3 if "attn2" in name else 5 for name in calls}
    pipe.unet.set_attn_processor(plain_processors)
    with cachekit.apply(pipe, "tgate:m=3,sp_interval=2"):
        assert not torch.equal(tiny.latents(pipe, steps=6), found)


def test_sliced_attention() -> None:
    pipe = tiny.small()
    without = tiny.latents(pipe, steps=STEPS)
    with cachekit.apply(pipe, "tgate:m=3") as attachment:
        whole = tiny.latents(pipe, steps=STEPS)
        pipe.enable_attention_slicing(1)
        sliced = tiny.latents(pipe, steps=STEPS)
        assert sum(count.reused for count in attachment.report().counts) == 2 * 7
    assert torch.allclose(sliced, whole, atol=1e-2)
    pipe.disable_attention_slicing()
    assert torch.equal(tiny.latents(pipe, steps=STEPS), without)


# -- edits in place ---------------------------------------------------------------------------------------


def exit_of(unet: Any, branch: int) -> torch.nn.Module:
    """Find the module whose output enters the up layer of a branch."""
    depth, layer = divmod(branch, 3)
    up, boundary = len(unet.up_blocks) - 1 - depth, 2 - layer
    if boundary:
        block = unet.up_blocks[up]
        return (getattr(block, "attentions", None) or block.resnets)[boundary - 1]
    return unet.up_blocks[up - 1] if up else unet.mid_block


def replay(pipe: Any, branch: int, interval: int) -> Any:
    """Compute everything in every step, and then put the last full step's tensor in its place."""
    kept, calls = [], 0

    def exchange(module: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        tensor = output[0] if isinstance(output, tuple) else output
        if (calls - 1) % interval == 0:
            kept[:] = [tensor.clone()]
            return output
        return (kept[0].clone(),) if isinstance(output, tuple) else kept[0].clone()

    exit_of(pipe.unet, branch).register_forward_hook(exchange)
    return pipe


@pytest.mark.parametrize("freeu", [False, True])
@pytest.mark.parametrize("branch", range(6))
def test_deepcache_equals_a_replay_although_freeu_edits_in_place(branch: int, freeu: bool) -> None:
    found = []
    for pipe in (tiny.small(), replay(tiny.small(), branch, 2)):
        if freeu:
            pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
        if not found:
            cachekit.apply(pipe, f"deepcache:interval=2,branch={branch}")
        found.append(tiny.latents(pipe, steps=STEPS))
    assert torch.equal(*found)


@pytest.mark.parametrize("specs", POLICIES, ids="+".join)
def test_freeu_under_every_policy(specs: tuple[str, ...]) -> None:
    pipe = tiny.small()
    with cachekit.apply(pipe, specs):
        without = tiny.latents(pipe, steps=STEPS)
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
        found = tiny.latents(pipe, steps=STEPS)
        pipe.disable_freeu()
        assert torch.equal(tiny.latents(pipe, steps=STEPS), without)
    assert not torch.equal(found, without)


# -- wrappers and other pipelines -------------------------------------------------------------------------


@pytest.mark.parametrize("specs", POLICIES, ids="+".join)
@pytest.mark.parametrize("before_apply", [True, False])
def test_an_offloading_wrapper_at_the_root(before_apply: bool, specs: tuple[str, ...]) -> None:
    pipe = tiny.small()
    with cachekit.apply(pipe, specs):
        expected = tiny.latents(pipe, steps=4)
    if before_apply:
        add_hook_to_module(pipe.unet, ModelHook())
    with cachekit.apply(pipe, specs):
        if not before_apply:
            add_hook_to_module(pipe.unet, ModelHook())
        for _ in range(2):
            assert torch.equal(tiny.latents(pipe, steps=4), expected)
            # What an offloaded pipeline does between its calls.
            remove_hook_from_module(pipe.unet)
            add_hook_to_module(pipe.unet, ModelHook())


def with_three_branches() -> tuple[Any, dict[str, Any]]:
    parts = tiny.small(in_channels=8).components
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"image": tiny.picture(), "image_guidance_scale": 2.0, "steps": 3}


@pytest.mark.parametrize("spec", ["tgate:m=2", "adaptive_guidance:m=2"])
def test_none_of_three_branches_is_dropped(spec: str) -> None:
    pipe, given = with_three_branches()
    without = tiny.latents(pipe, **given)
    with cachekit.apply(pipe, spec), pytest.raises(GuidanceError, match="this pipeline's guidance is not supported"):
        tiny.latents(pipe, **given)
    assert torch.equal(tiny.latents(pipe, **given), without)


def test_three_branches_keep_their_deep_features() -> None:
    pipe, given = with_three_branches()
    without = tiny.latents(pipe, **given)
    with cachekit.apply(pipe, "deepcache:interval=2"):
        found = tiny.latents(pipe, **given)
        assert torch.equal(tiny.latents(pipe, **given), found)
    replayed, _ = with_three_branches()
    assert torch.equal(tiny.latents(replay(replayed, 0, 2), **given), found)
    assert not torch.equal(found, without)
    assert torch.equal(tiny.latents(pipe, **given), without)
