"""Unusual denoisers and loops are cached to the bit, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import (
    AnimateDiffPipeline,
    AudioLDM2UNet2DConditionModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    MotionAdapter,
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetMotionModel,
)
from support import tiny

import cachekit
from cachekit.errors import CachekitError, GuidanceError, PolicyError
from cachekit.runs.clock import Clock, mark_of
from cachekit.tools.coverage.building import arguments, build
from cachekit.upstream.guidance import is_guided

UNET = {
    "sample_size": 16,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": tiny.WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VIDEO = {
    "sample_size": 16,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "cross_attention_dim": tiny.WIDTH,
    "norm_num_groups": 4,
}
IMAGE = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
FRAMES = torch.randn(2, 4, 2, 16, 16, generator=torch.Generator().manual_seed(1))


def audio() -> torch.nn.Module:
    return AudioLDM2UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, tiny.WIDTH, tiny.WIDTH), (None, tiny.WIDTH, tiny.WIDTH)),
        attention_head_dim=2,
        norm_num_groups=4,
    )


def skip_convolutions() -> torch.nn.Module:
    return UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32, 32),
        layers_per_block=2,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
        time_embedding_type="fourier",
    )


def text(batch: int = 2) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": tiny.text(batch)}


# denoiser, arguments, number of regions
STRUCTURES: dict[str, tuple[Callable[[], torch.nn.Module], dict[str, Any], int]] = {
    "three levels": (lambda: UNet2DConditionModel(**UNET), {"sample": IMAGE, **text()}, 9),
    "no middle": (lambda: UNet2DConditionModel(**{**UNET, "mid_block_type": None}), {"sample": IMAGE, **text()}, 8),
    "uneven layers": (
        lambda: UNet2DConditionModel(**{**UNET, "layers_per_block": (1, 3, 2)}),
        {"sample": IMAGE, **text()},
        9,
    ),
    "several attentions per layer": (audio, {"sample": IMAGE, **text(), "encoder_hidden_states_1": tiny.text(2)}, 6),
    "skip convolutions": (skip_convolutions, {"sample": IMAGE[:, :3]}, 0),
    "three dimensions": (
        lambda: UNet3DConditionModel(
            **VIDEO,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        {"sample": FRAMES, **text()},
        4,
    ),
    "motion": (
        lambda: UNetMotionModel(
            **VIDEO,
            num_attention_heads=2,
            motion_num_attention_heads=2,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        ),
        {"sample": FRAMES, **text(4)},
        4,
    ),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_skipped_step_of_equal_inputs_equals_a_full_one(name: str) -> None:
    make, inputs, regions = STRUCTURES[name]
    denoiser = tiny.seeded(make())
    timesteps = torch.full((3,), 500)
    with torch.no_grad():
        plain = denoiser(**inputs, timestep=timesteps[0], return_dict=False)[0]
        for branch in range(regions):
            with cachekit.apply(denoiser, f"deepcache:interval=3,branch={branch}") as attachment:
                found = [denoiser(**inputs, timestep=timestep, return_dict=False)[0] for timestep in timesteps]
                counts = attachment.report().counts[0]
            assert [torch.equal(one, plain) for one in found] == [True] * 3, branch
            assert (counts.stored, counts.reused) == (1, 2)
    with pytest.raises(CachekitError, match=f"{regions - 1}; use one" if regions else "paired down and up"):
        cachekit.apply(denoiser, f"deepcache:branch={regions}")


def animated() -> AnimateDiffPipeline:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=tiny.WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    adapter = MotionAdapter(
        block_out_channels=(32, 32), motion_layers_per_block=1, motion_norm_num_groups=4, motion_num_attention_heads=4
    )
    pipe = AnimateDiffPipeline(
        vae=tiny.vae(),
        text_encoder=None,
        tokenizer=None,
        unet=tiny.seeded(unet),
        motion_adapter=tiny.seeded(adapter),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def frames(pipe: AnimateDiffPipeline) -> torch.Tensor:
    given = {"prompt_embeds": tiny.text(1), "negative_prompt_embeds": tiny.text(1, seed=4), "num_frames": 2}
    generator = torch.Generator().manual_seed(0)
    return pipe(**given, height=16, width=16, num_inference_steps=4, output_type="latent", generator=generator).frames


def test_a_video_pipeline_runs_and_reports() -> None:
    pipe = animated()
    plain = frames(pipe)
    with cachekit.apply(pipe, ["tgate:m=2", "deepcache:interval=2"]) as attachment:
        assert not torch.equal(frames(pipe), plain)
        assert 0 < attachment.report().macs < attachment.report().baseline_macs
    assert torch.equal(frames(pipe), plain)


def test_a_second_loop_within_a_call_is_a_run_of_its_own() -> None:
    pipe = animated()
    pipe.enable_free_init(num_iters=2, use_fast_sampling=False)
    branches: list[int] = []
    with cachekit.apply(pipe, "tgate:m=2"):
        pipe.unet.conv_in.register_forward_hook(lambda module, args, output: branches.append(len(args[0]) // 2))
        frames(pipe)
    assert branches == [2, 2, 1, 1] * 2


def test_a_second_loop_is_detected_although_its_first_frames_are_given() -> None:
    """Its timesteps are copies, their scheduler has no step index, and no mean of them is as large as the first."""
    name = "SkyReelsV2DiffusionForcingPipeline"
    pipe, long = build(name), {"num_frames": 17, "base_num_frames": 9, "overlap_history": 1}
    with cachekit.apply(pipe, "adaptive_guidance:m=2") as attachment:
        pipe(**{**arguments(pipe, name), **long})
        report = attachment.report()
    assert [len(row.branches) for loop in (*report.earlier, report) for row in loop.record.rows] == [
        2,
        2,
        1,
        1,
        1,
        1,
    ] * 2


@pytest.mark.parametrize("is_number", [False, True])
def test_a_second_loop_is_detected_by_the_step_index_of_the_scheduler(is_number: bool) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    clock, steps = Clock(exact=True), []
    for _ in range(3):
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            for _ in range(2):
                mark = mark_of(float(t) if is_number else t / 1000, scheduler)
                clock = Clock(exact=True) if clock.starts_anew(mark) else clock
                steps.append((clock.tick(mark), clock.call))
            scheduler.step(torch.zeros(1, 1), t, torch.zeros(1, 1))
    assert steps == [(step, call) for step in range(3) for call in range(2)] * 3


def test_a_loop_may_go_on_with_copies_of_its_timesteps() -> None:
    table, clock = torch.tensor([900, 700, 500, 300]), Clock(exact=True)
    for mark in (mark_of(table[0], None), *(mark_of(float(t), None) for t in table[1:])):
        assert not clock.starts_anew(mark)
        clock.tick(mark)
    assert clock.step == 3


@pytest.mark.parametrize("times", [[900, 700, 700, 500], [100, 300, 500, 900]])
def test_a_loop_of_numbers_may_rise_or_fall_but_not_turn(times: list[int]) -> None:
    clock = Clock(exact=True)
    for t in times:
        assert not clock.starts_anew(mark_of(t, None))
        clock.tick(mark_of(t, None))
    assert clock.starts_anew(mark_of(times[0], None))


def bare(unet: torch.nn.Module, timesteps: Any) -> list[torch.Tensor]:
    """Outputs of calls without a pipeline."""
    with torch.no_grad():
        return [unet(IMAGE, t, tiny.text(2)).sample for t in timesteps]


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("forecast", "every(last=true)"),
        ("forecast:interval=5,first=3", "every(n=5,first=3,last=true)"),
        ("deepcache:schedule=quadratic", "window(when=quadratic)"),
        ("cache:where=denoiser,what=chebyshev", "chebyshev"),
    ],
)
def test_a_loop_that_does_not_show_its_length_has_no_last_step(spec: str, part: str) -> None:
    """A step of a hundred was once taken as the last, and no step of a shorter loop."""
    unet, times = tiny.small().unet, (900, 600, 300)
    plain = bare(unet, times)
    with cachekit.apply(unet, spec), pytest.raises(PolicyError) as caught:
        bare(unet, times)
    assert str(caught.value) == (
        f"{spec}: {part} needs the number of steps, which this loop does not show; take its timesteps out of"
        " scheduler.timesteps, or use a part that does without, such as every(2)"
    )
    assert all(map(torch.equal, bare(unet, times), plain))


def test_a_loop_that_does_not_show_its_length_may_go_beyond_any_plan() -> None:
    unet = tiny.small().unet
    with cachekit.apply(unet, "forecast:interval=40,last=false") as attachment:
        bare(unet, range(210, 0, -1))
        report = attachment.report()
    full = [step for step, row in enumerate(report.record.rows) if row.actions[0] is not cachekit.Action.REUSE]
    assert full == [0, 40, 80, 120, 160, 200]


def test_a_loop_over_the_table_of_a_scheduler_has_a_last_step() -> None:
    pipe = tiny.small()
    pipe.scheduler.set_timesteps(6)
    with cachekit.apply(pipe.unet, "forecast:interval=4") as attachment:
        bare(pipe.unet, pipe.scheduler.timesteps)
        report = attachment.report()
    assert [call.left_out for call in report.record.calls] == [False, True, True, True, False, False]


def test_denoisers_that_take_turns_keep_their_own() -> None:
    """In one step, the first denoiser is given text and image, the second the image alone."""
    pipe = build("Ideogram4Pipeline")
    with cachekit.apply(pipe, "delta_dit:interval=2") as attachment:
        pipe(**arguments(pipe, "Ideogram4Pipeline"))
        (count,) = attachment.report().counts
    assert (count.targets, count.stored, count.reused, count.missed) == (2, 6, 6, 0)


def test_a_perturbed_branch_in_a_bare_loop_is_refused() -> None:
    """A pipeline of another one's parts runs its denoiser, and doesn't declare the second half of its batch."""
    parts = tiny.small().components
    pipe = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    plain = tiny.latents(pipe, guidance=1.0, pag_scale=3.0)
    with cachekit.apply(pipe.unet, "adaptive_guidance:m=3"), pytest.raises(GuidanceError, match="set pag_scale=0"):
        tiny.latents(pipe, guidance=1.0, pag_scale=3.0)
    assert torch.equal(tiny.latents(pipe, guidance=1.0, pag_scale=3.0), plain)


def test_a_third_branch_is_refused() -> None:
    parts = tiny.small().components
    pipe = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    with cachekit.apply(pipe, "adaptive_guidance:m=1"), pytest.raises(GuidanceError, match="pag_scale=0"):
        tiny.latents(pipe, batch=2, latents=torch.ones(2, 4, 16, 16), pag_scale=3.0)


class Config(dict[str, Any]):
    """A denoiser's config."""


@pytest.mark.parametrize(
    ("config", "scale", "guided"),
    [({"guidance_embeds": False}, 3.5, None), ({"guidance_embeds": True}, 3.5, False), ({}, 3.5, None)]
    + [({}, 1.0, False), ({}, None, False)],
)
def test_a_scale_that_feeds_an_embedding_is_no_branch(config: dict, scale: float | None, guided: bool | None) -> None:
    denoiser = torch.nn.Module()
    denoiser.config = Config(config)
    assert is_guided(object(), {"guidance_scale": scale}, denoiser, None) is guided


@pytest.mark.parametrize(
    ("arguments", "guided"),
    [({"prior_guidance_scale": 4.0, "decoder_guidance_scale": 1.0}, None), ({"decoder_guidance_scale": 1.0}, False)]
    + [({"guidance_scale": 4.0, "sld_guidance_scale": 1000}, True), ({"guidance_scale": 1.0, "edit": 1}, False)]
    + [({"guidance_scale": 1.0, "sld_guidance_scale": 1000}, False), ({"edit_guidance_scale": [5]}, False)],
)
def test_scales_of_stages_and_of_a_third_branch(arguments: dict[str, Any], guided: bool | None) -> None:
    assert is_guided(object(), arguments, torch.nn.Module(), None) is guided


def test_a_pipeline_that_always_claims_to_be_unguided_is_ignored() -> None:
    pipe = build("StableDiffusionPanoramaPipeline")
    assert not pipe.do_classifier_free_guidance
    for scale in (1.0, 4.0):
        assert is_guided(pipe, {"guidance_scale": scale}, pipe.unet, None) is (scale > 1)


def listed(pipe: Any, **changes: Any) -> torch.Tensor:
    """Make the latents of two prompts, whose samples reach the denoiser in a list."""
    prompts = {"prompt": ["a red cat", "fog"], "negative_prompt": ["dull", ""]}
    generator = torch.Generator().manual_seed(0)
    call = {**arguments(pipe, "ZImagePipeline"), **prompts, "output_type": "latent", "generator": generator, **changes}
    return pipe(**call).images


@pytest.mark.parametrize(("spec", "guided"), [("adaptive_guidance:m=2", 2), ("adaptive_guidance:threshold=-1", 1)])
def test_branches_in_a_list_are_narrowed_as_the_pipeline_does_it(spec: str, guided: int) -> None:
    """The pipeline's own `cfg_truncation` ends guidance after a step, and runs the conditional branch alone."""
    pipe = build("ZImagePipeline")
    plain = listed(pipe)
    passed = (1000 - pipe.scheduler.timesteps) / 1000
    with cachekit.apply(pipe, spec) as attachment:
        cached = listed(pipe)
        branches = [made.row.branches for made in attachment.report().record.calls]
    assert branches == [("cond", "uncond")] * guided + [("cond",)] * (len(passed) - guided)
    assert torch.equal(cached, listed(pipe, cfg_truncation=float(passed[guided - 1 : guided + 1].mean())))
    assert not torch.equal(cached, plain)
    assert torch.equal(listed(pipe), plain)


def test_samples_of_several_sizes_are_refused() -> None:
    pipe = build("ZImagePipeline")
    images = [torch.zeros(4, 1, side, side) for side in (8, 4)]
    with (
        cachekit.apply(pipe, "delta_dit"),
        torch.no_grad(),
        pytest.raises(CachekitError, match="ZImageTransformer2DModel: samples of several sizes"),
    ):
        pipe.transformer(images, torch.zeros(2), [torch.zeros(3, 32)] * 2)


def test_costs_are_counted_where_hooks_move_the_weights() -> None:
    pipe = tiny.small()
    with cachekit.apply(pipe, "tgate:m=2") as attachment:
        tiny.latents(pipe, steps=4)
        wanted = attachment.report().cost
    add_hook_to_module(pipe.unet, CpuOffload(execution_device="cpu"))
    with cachekit.apply(pipe, "tgate:m=2") as attachment:
        tiny.latents(pipe, steps=4)
        assert attachment.report().cost == wanted


def test_a_pipeline_ends_the_bare_loop_before_it() -> None:
    pipe = tiny.small()
    attachment = cachekit.apply(pipe, "tgate:m=1")
    pipe.scheduler.set_timesteps(3)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            pipe.unet(IMAGE, timestep, **text())
    tiny.latents(pipe, steps=4)
    assert attachment.report().steps == 4


def test_a_loop_at_one_timestep_keeps_a_bounded_number_of_bytes() -> None:
    pipe = tiny.small()
    kept = []
    with cachekit.apply(pipe, "deepcache:interval=2") as attachment, torch.no_grad():
        for _ in range(40):
            pipe.unet(IMAGE, 500, **text())
            kept.append(attachment.report().cache_bytes)
    assert max(kept[:20]) == max(kept[20:])


def test_calls_of_all_branches_are_counted() -> None:
    pipe = tiny.small()
    with cachekit.apply(pipe, "adaptive_guidance:m=3") as attachment:
        tiny.latents(pipe, steps=5)
        counts = attachment.report().counts[0]
    assert (counts.computed, counts.reused) == (3, 2)


def test_an_output_without_a_batch_is_passed_through() -> None:
    """Such as a loss that a denoiser returns beside its prediction."""
    pipe = tiny.small()
    expected = tiny.latents(pipe)

    def with_loss(_: Any, given: Any, output: Any) -> Any:
        return (*output, torch.zeros(()))

    specs = ["deepcache:interval=2", "adaptive_guidance:m=3,linear=true"]
    with cachekit.apply(pipe, specs):
        cached = tiny.latents(pipe)
    pipe.unet.register_forward_hook(with_loss)
    assert torch.equal(tiny.latents(pipe), expected)
    with cachekit.apply(pipe, specs):
        assert torch.equal(tiny.latents(pipe), cached)
    assert not torch.equal(cached, expected)
