"""Branches: narrowed as planned, wherever the guidance ends, and kept tensors follow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    VQDiffusionScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from support import tiny

import cachekit
from cachekit.driving.detection import Layout
from cachekit.driving.slicing import pick
from cachekit.errors import GuidanceError
from cachekit.interface.moment import Entry, Time
from cachekit.interface.parts import BranchChange, Choice
from cachekit.interface.policy import Policy
from cachekit.runs.store import Store
from cachekit.tools.coverage.building import arguments, build
from cachekit.upstream.prediction import predict_x0

MAKERS = {"sd": tiny.small, "sdxl": tiny.sdxl, "pixart": tiny.pixart, "dit": tiny.dit, "svd": tiny.svd}

shared = tiny.sharing(MAKERS)


def cached(name: str, *specs: str, **changes: Any) -> torch.Tensor:
    return cached_with_report(name, *specs, **changes)[0]


def cached_with_report(name: str, *specs: str, **changes: Any) -> tuple[torch.Tensor, Any]:
    with cachekit.apply(shared(name), specs) as attachment:
        return tiny.latents(shared(name), **changes), attachment.report()


def branches(report: Any) -> str:
    return "".join(
        {("uncond", "cond"): "2", ("cond",): "c", ("uncond",): "u"}[row.branches] for row in report.record.rows
    )


# -- a loop by hand, one line per step --------------------------------------------------------------------

NEGATIVE, POSITIVE = tiny.text(1, seed=4), tiny.text(1)
NOISE = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))


def by_hand(script: list[str], batch: int = 1, scheduler: Any = None) -> torch.Tensor:
    """Sample with SD's tiny UNet; each step is "2", "c" or "u" and then what cross-attention does."""
    unet, scheduler = tiny.small().unet, scheduler or tiny.small().scheduler
    attention = tiny.TgateByHand(unet)
    u, c = tiny.text(batch, seed=4), tiny.text(batch)
    texts = {"2": torch.cat([u, c]), "c": c, "u": u}
    scheduler.set_timesteps(len(script))
    latents = NOISE[:batch] * scheduler.init_noise_sigma
    for line, t in zip(script, scheduler.timesteps):
        which, _, attention.mode = line.partition(" ")
        sample = torch.cat([latents] * 2) if which == "2" else latents
        with torch.no_grad():
            output = unet(scheduler.scale_model_input(sample, t), t, texts[which]).sample
        latents = scheduler.step(tiny.guide(output) if which == "2" else output, t, latents).prev_sample
    return latents


# -- no guidance, batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize("batch", [1, 2])
def test_without_guidance_each_prompt_keeps_its_own_attention(batch: int, scale: float) -> None:
    found, report = cached_with_report("sd", "tgate:m=3", steps=6, guidance=scale, batch=batch, latents=NOISE[:batch])
    assert branches(report) == "cccccc"
    assert torch.equal(found, by_hand(["c", "c", "c keep", *["c reuse"] * 3], batch))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("spec", ["adaptive_guidance:m=2", "null_text:after=2", "adaptive_guidance:threshold=-1.0"])
def test_without_guidance_there_is_nothing_to_drop(name: str, spec: str) -> None:
    found, report = cached_with_report(name, spec, steps=4, guidance=1.0)
    assert torch.equal(found, tiny.latents(shared(name), steps=4, guidance=1.0))
    assert report.warnings == [f"{spec} never fired in this run of 4 unguided steps"]


POLICIES = [
    ("tgate:m=2",),
    ("deepcache:interval=2",),
    ("adaptive_guidance:m=2",),
    ("tgate:m=3", "deepcache:interval=2"),
]


@pytest.mark.parametrize("specs", POLICIES, ids="+".join)
@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_several_images_per_prompt_are_a_batch(name: str, specs: tuple[str, ...]) -> None:
    pipe = shared(name)
    given = tiny.arguments(pipe, steps=4, batch=2)
    embeddings = [key for key in given if key.endswith("embeds")]
    repeated = {**given, **{key: given[key].repeat_interleave(2, dim=0) for key in embeddings}}
    with cachekit.apply(pipe, specs):
        found = pipe(**given, num_images_per_prompt=2).images
        repeated["generator"] = torch.Generator().manual_seed(0)
        expected = pipe(**repeated).images
    assert len(found) == 4
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart", "dit"])
def test_images_of_a_batch_do_not_mix(name: str) -> None:
    """The first two images are the same whatever the third one is."""
    pipe = shared(name)
    spec = "adaptive_guidance:m=2" if name == "dit" else "tgate:m=2"
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    given = tiny.arguments(pipe, steps=4, batch=3)
    other = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
    for key, value in other.items():
        if key.endswith("embeds"):
            value[2] = value[2].flip(-1)
    if name == "dit":
        other["class_labels"] = [0, 1, 7]
    with cachekit.apply(pipe, spec):
        found = []
        for arguments in (given, other):
            for generator in generators:
                generator.manual_seed(generator.initial_seed())
            found.append(torch.as_tensor(pipe(**{**arguments, "generator": generators}).images))
    assert torch.equal(found[0][:2], found[1][:2])
    assert not torch.equal(found[0][2], found[1][2])


# -- the pipeline itself cuts its guidance ----------------------------------------------------------------


@pytest.mark.parametrize("specs", [("deepcache:interval=3",), ("tgate:m=5",), ("tgate:m=5", "deepcache:interval=2")])
@pytest.mark.parametrize("m", [2, 4])
def test_guidance_cut_by_the_pipeline_is_an_event_like_our_own(specs: tuple[str, ...], m: int) -> None:
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=m - 1)
    found, report = cached_with_report("sd", *specs, steps=8, callback_on_step_end=cut)
    assert branches(report) == "2" * m + "c" * (8 - m)
    assert torch.equal(found, cached("sd", *specs, f"adaptive_guidance:m={m}", steps=8))


def test_guidance_cut_by_the_pipeline_after_the_gate_computes_the_other_branch() -> None:
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)
    found, report = cached_with_report("sd", "tgate:m=2", steps=6, callback_on_step_end=cut, latents=NOISE[:1])
    assert torch.equal(found, by_hand(["2", "2 keep the mean", "u reuse", "u reuse", "c keep", "c reuse"]))
    assert sum(count.missed for count in report.counts) == 6


# -- narrowing at the denoiser's boundary -----------------------------------------------------------------


def test_narrowing_cuts_everything_batched_and_nothing_else() -> None:
    def rows(*shape: int) -> torch.Tensor:
        return torch.arange(float(torch.Size(shape).numel())).reshape(shape)

    arguments = {
        "sample": rows(4, 3),
        "timestep": torch.tensor(7),
        "timesteps_per_image": rows(4),
        "encoder_hidden_states": rows(4, 5, 2),
        "encoder_hidden_states_per_frame": rows(8, 2),
        "encoder_attention_mask": rows(4, 1, 5) > 3,
        "added_cond_kwargs": {"text_embeds": rows(4, 6), "image_embeds": [rows(4, 1, 2), rows(4, 3)], "none": None},
        "down_block_additional_residuals": (rows(4, 2), [rows(4, 3)]),
        "cross_attention_kwargs": {"scale": 0.5, "ip_adapter_masks": [rows(4, 2)]},
        "unbatched": rows(3, 4),
        "image_rotary_emb": (rows(4, 2), rows(4, 2)),
        "return_dict": False,
    }
    for branch, half in (("uncond", slice(0, 2)), ("cond", slice(2, 4))):
        picked = pick(arguments, Layout(), branch, 4)
        whole = dict(arguments)
        for name in ("sample", "timesteps_per_image", "encoder_hidden_states", "encoder_attention_mask"):
            assert torch.equal(picked[name], whole.pop(name)[half])
        frames = whole.pop("encoder_hidden_states_per_frame")
        assert torch.equal(picked["encoder_hidden_states_per_frame"], frames.chunk(2)[branch == "cond"])
        added, given = picked["added_cond_kwargs"], whole.pop("added_cond_kwargs")
        assert torch.equal(added["text_embeds"], given["text_embeds"][half])
        assert all(torch.equal(one, other[half]) for one, other in zip(added["image_embeds"], given["image_embeds"]))
        assert added["none"] is None
        first, (second,) = picked["down_block_additional_residuals"]
        assert isinstance(picked["down_block_additional_residuals"], tuple)
        given_first, (given_second,) = whole.pop("down_block_additional_residuals")
        assert torch.equal(first, given_first[half])
        assert torch.equal(second, given_second[half])
        assert picked["cross_attention_kwargs"]["scale"] == 0.5
        assert (
            picked["cross_attention_kwargs"]["ip_adapter_masks"][0]
            is arguments["cross_attention_kwargs"]["ip_adapter_masks"][0]
        )
        assert picked["image_rotary_emb"][0] is arguments["image_rotary_emb"][0]
        assert all(picked[name] is whole[name] for name in ("timestep", "unbatched", "return_dict"))


def test_narrowing_cuts_lists_by_their_items_where_each_is_an_image() -> None:
    """A caption of four tokens is no batch of four; residuals may have numbers for names."""
    images, captions, others = ([torch.full((4, 2), float(place)) for place in range(count)] for count in (4, 4, 3))
    residual = torch.arange(8.0).reshape(4, 2)
    arguments = {"x": images, "t": torch.arange(4), "cap_feats": captions, "samples": {0: residual}, "others": others}
    picked = pick(arguments, Layout(("cond", "uncond")), "uncond", 4, is_listed=True)
    assert [one.mean().item() for one in (*picked["x"], *picked["cap_feats"])] == [2, 3, 2, 3]
    assert picked["t"].tolist() == [2, 3]
    assert torch.equal(picked["samples"][0], residual[2:])
    assert picked["others"] is others


@pytest.mark.parametrize(("spec", "half"), [("adaptive_guidance:m=2", 1), ("null_text:after=2", 0)])
@pytest.mark.parametrize(("name", "batch"), [("sdxl", 2), ("pixart", 2), ("svd", 1)])
def test_narrowing_equals_slicing_by_hand(name: str, batch: int, spec: str, half: int) -> None:
    pipe = tiny.narrowed_by_hand(MAKERS[name](), 2, half)
    assert torch.equal(cached(name, spec, steps=5, batch=batch), tiny.latents(pipe, steps=5, batch=batch))


# -- adaptive guidance ------------------------------------------------------------------------------------


def scheduler_of(kind: type, prediction: str) -> Any:
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    extra = {"clip_sample": False, "steps_offset": 1} if kind is DDIMScheduler else {}
    return kind(prediction_type=prediction, **betas, **extra)


def gammas_by_hand(scheduler: Any, space: str, steps: int, batch: int) -> list[float]:
    """Compute the cosine of both branches in each step of a fully guided run, of the image where it is smallest."""
    unet, gammas = tiny.small().unet, []
    text = torch.cat([tiny.text(batch, seed=4), tiny.text(batch)])
    scheduler.set_timesteps(steps)
    latents = NOISE[:batch] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad():
            output = unet(scheduler.scale_model_input(torch.cat([latents] * 2), t), t, text).sample
        seen = list(output.chunk(2))
        after = scheduler.step(tiny.guide(output), t, latents)
        if space == "x0":
            # The scheduler's own estimate, which is linear in the prediction: guidance 0 and 1 give the branches.
            index, seen = getattr(scheduler, "_step_index", None), []
            for half in output.chunk(2):
                if index is not None:
                    scheduler._step_index = index - 1
                seen.append(scheduler.step(half, t, latents).pred_original_sample)
        gammas.append(torch.cosine_similarity(*(part.flatten(1) for part in seen)).min().item())
        latents = after.prev_sample
    return gammas


@pytest.mark.parametrize("space", ["eps", "x0"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler])
def test_guidance_ends_after_the_step_that_reaches_the_threshold(kind: type, prediction: str, space: str) -> None:
    steps, batch = 8, 2
    gammas = gammas_by_hand(scheduler_of(kind, prediction), space, steps, batch)
    crossing = [step for step in range(1, steps - 1) if gammas[step] > max(gammas[:step]) + 4e-4][-1]
    pipe, scheduler = shared("sd"), shared("sd").scheduler
    pipe.scheduler = scheduler_of(kind, prediction)
    try:
        given = {"steps": steps, "batch": batch, "latents": NOISE}
        threshold = (gammas[crossing] + max(gammas[:crossing])) / 2
        found, report = cached_with_report("sd", f"adaptive_guidance:threshold={threshold},space={space}", **given)
        assert branches(report) == "2" * (crossing + 1) + "c" * (steps - crossing - 1)
        trace = report.traces["adaptive_guidance"]
        assert [step for step, _ in trace] == list(range(crossing + 1))
        assert [gamma for _, gamma in trace] == pytest.approx(gammas[: crossing + 1], abs=2e-5)
        assert torch.equal(found, cached("sd", f"adaptive_guidance:m={crossing + 1}", **given))
    finally:
        pipe.scheduler = scheduler


CONTINUOUS = {"use_karras_sigmas": True, "timestep_type": "continuous", "sigma_max": 80.0}


@pytest.mark.parametrize(
    ("kind", "prediction", "settings"),
    [
        *((DDIMScheduler, prediction, {"clip_sample": False}) for prediction in ("epsilon", "v_prediction", "sample")),
        *((EulerDiscreteScheduler, prediction, {}) for prediction in ("epsilon", "v_prediction")),
        (EulerDiscreteScheduler, "epsilon", {"timestep_spacing": "leading"}),
        (EulerDiscreteScheduler, "v_prediction", {"use_karras_sigmas": True}),
        (EulerDiscreteScheduler, "v_prediction", CONTINUOUS),
    ],
)
def test_x0_is_what_the_scheduler_says(kind: type, prediction: str, settings: dict[str, Any]) -> None:
    scheduler = kind(prediction_type=prediction, beta_schedule="scaled_linear", **settings)
    scheduler.set_timesteps(5)
    output = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(7))
    sample = NOISE[:, :, :3, :3] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(sample, t)
        told = scheduler.step(output, t, sample)
        found = predict_x0(scaled, output, t, scheduler)
        assert torch.allclose(found, told.pred_original_sample, atol=2e-3, rtol=2e-3)
        sample = told.prev_sample


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    ],
)
@pytest.mark.parametrize("scale", [1, 1e-3])
def test_x0_of_a_rectified_flow(scheduler: Any, scale: float) -> None:
    """Some pipelines give their denoiser the share of noise as its time: the scheduler knows."""
    scheduler.set_timesteps(4)
    clean, noise = NOISE[:1], NOISE[1:]
    scheduler._step_index = None
    begin, end = (noise, clean) if scheduler.config.get("invert_sigmas") else (clean, noise)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        sample = (1 - sigma) * begin + sigma * end
        assert torch.allclose(predict_x0(sample, end - begin, t * scale, scheduler), clean, atol=1e-5)
        scheduler.step(end - begin, t, sample)


@pytest.mark.parametrize("kind", [EDMEulerScheduler, DDPMWuerstchenScheduler, VQDiffusionScheduler])
def test_x0_that_is_not_known_is_refused(kind: Any) -> None:
    """One makes it of outputs in its own way, one has no table, and one samples classes."""
    scheduler = kind(4) if kind is VQDiffusionScheduler else kind()
    with pytest.raises(GuidanceError, match=f"x0 is not known from outputs under {kind.__name__}; compare"):
        predict_x0(NOISE, NOISE, torch.tensor(0.5), scheduler)


def test_x0_of_a_pipeline_that_cannot_tell_is_refused() -> None:
    pipe = build("StableCascadeDecoderPipeline")
    with (
        cachekit.apply(pipe, "adaptive_guidance:threshold=0.9,space=x0"),
        pytest.raises(GuidanceError, match="x0 is not known from outputs under DDPMWuerstchenScheduler"),
    ):
        pipe(**arguments(pipe, "StableCascadeDecoderPipeline"))


class Clean(Policy):
    """Write down what each branch's clean sample would be."""

    name: ClassVar[str] = "clean"

    def choices(self) -> dict[str, Choice]:
        return {}

    def observe(self, seen: Any, memory: dict[str, Any]) -> None:
        memory.setdefault("trace", []).append({branch: seen.denoised(branch) for branch in seen.outputs})


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "ZImagePipeline"])
def test_guided_x0_is_that_of_the_pipeline(name: str) -> None:
    """The last step ends at the x0 that guidance makes; one of these pipelines turns the sign of what it is given."""
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    pipe = build(name)
    with cachekit.apply(pipe, Clean()) as attachment:
        latents = pipe(**arguments(pipe, name) | {"output_type": "latent"}).images.flatten()
        last = attachment.report().traces["clean"][-1]
    uncond, difference = last["uncond"].flatten(), (last["cond"] - last["uncond"]).flatten()
    scale = difference @ (latents - uncond) / (difference @ difference)  # some pipelines count from the other branch
    assert scale > 1
    assert torch.allclose(uncond + scale * difference, latents, atol=1e-5)


@pytest.mark.parametrize("space", ["eps", "x0"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_pipeline_is_observed(name: str, space: str) -> None:
    """Channels of an input image and of a learned variance are no part of what is compared."""
    _, report = cached_with_report(name, f"adaptive_guidance:threshold=1.0,space={space}", steps=3)
    gammas = [gamma for _, gamma in report.traces["adaptive_guidance"]]
    assert len(gammas) == 3
    assert all(-1 <= gamma <= 1 + 1e-5 for gamma in gammas)


def test_every_says_how_often_branches_are_compared() -> None:
    _, report = cached_with_report("sd", "adaptive_guidance:threshold=1.0,every=3", steps=8)
    assert [step for step, _ in report.traces["adaptive_guidance"]] == [0, 3, 6]
    assert branches(report) == "2" * 8


def test_a_threshold_below_everything_guides_the_first_step_alone() -> None:
    found, report = cached_with_report("sd", "adaptive_guidance:threshold=-1.0", steps=4)
    assert branches(report) == "2ccc"
    assert torch.equal(found, cached("sd", "adaptive_guidance:m=1", steps=4))


@pytest.mark.parametrize("spec", ["adaptive_guidance:m=3,linear=true", "adaptive_guidance:threshold=-1,linear=true"])
def test_linear_adaptive_guidance_by_hand(spec: str) -> None:
    m = 3 if "m=" in spec else 1
    unet, scheduler = tiny.small().unet, tiny.small().scheduler
    scheduler.set_timesteps(6)
    latents, difference = NOISE[:1], torch.zeros(())
    for step, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            if step < m:
                both = unet(torch.cat([latents] * 2), t, torch.cat([NEGATIVE, POSITIVE])).sample
                u, c = both.chunk(2)
                difference = c - u
            else:
                c = unet(latents, t, POSITIVE).sample
                u = c - difference
        assert torch.allclose(u + 5.0 * (c - u), c + 4.0 * difference, atol=1e-4)
        latents = scheduler.step(u + 5.0 * (c - u), t, latents).prev_sample
    assert torch.equal(cached("sd", spec, steps=6, latents=NOISE[:1]), latents)


# -- who fires first decides ------------------------------------------------------------------------------


def test_a_difference_that_a_paused_step_did_not_keep_is_made_by_the_next() -> None:
    with cachekit.apply(pipe := tiny.small(), "adaptive_guidance:m=3,linear=true") as attachment:
        pause = contextlib.ExitStack()

        def follow(_: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
            pause.close()
            if step == 1:
                pause.enter_context(attachment.paused())
            return given

        found = tiny.latents(pipe, steps=6, callback_on_step_end=follow)
        (count,) = attachment.report().counts
    assert (count.stored, count.missed, count.reused) == (1, 1, 2)
    assert torch.equal(found, cached("sd", "adaptive_guidance:m=4,linear=true", steps=6))


def test_a_cut_before_the_gate_leaves_the_remaining_attention() -> None:
    found, report = cached_with_report("sd", "tgate:m=4", "adaptive_guidance:m=2", steps=6, latents=NOISE[:1])
    assert branches(report) == "22cccc"
    assert torch.equal(found, by_hand(["2", "2", "c", "c keep", "c reuse", "c reuse"]))


def test_a_gate_before_the_cut_keeps_its_branch() -> None:
    found, report = cached_with_report("sd", "tgate:m=2", "adaptive_guidance:m=4", steps=6)
    assert branches(report) == "22uuuu"
    assert torch.equal(found, cached("sd", "tgate:m=2", steps=6))


def test_a_gate_at_the_cut_leaves_the_conditional_branch_and_the_mean() -> None:
    found, report = cached_with_report("sdxl", "tgate:m=3", "adaptive_guidance:m=3", steps=5)
    assert branches(report) == "222cc"
    assert torch.equal(found, cached("sdxl", "tgate:m=3,keep=cond", steps=5))
    assert not torch.equal(found, cached("sdxl", "tgate:m=3", steps=5))


def test_a_threshold_before_the_gate_is_a_cut_like_any_other() -> None:
    specs = ("tgate:m=4", "deepcache:interval=3")
    found, report = cached_with_report("sd", *specs, "adaptive_guidance:threshold=-1", steps=7)
    assert branches(report) == "2cccccc"
    assert torch.equal(found, cached("sd", *specs, "adaptive_guidance:m=1", steps=7))


def test_a_threshold_never_reached_leaves_the_gate_alone() -> None:
    specs = ("tgate:m=4", "deepcache:interval=3")
    found = cached("sd", *specs, "adaptive_guidance:threshold=1", steps=7)
    assert torch.equal(found, cached("sd", *specs, steps=7))


def test_the_order_of_specs_does_not_matter() -> None:
    specs = ("tgate:m=4", "deepcache:interval=3", "adaptive_guidance:m=3", "null_text:before=1")
    assert torch.equal(cached("sd", *specs, steps=7), cached("sd", *reversed(specs), steps=7))


def test_all_three_that_choose_branches() -> None:
    specs = ("null_text:before=1", "adaptive_guidance:m=3", "tgate:m=4")
    found, report = cached_with_report("sd", *specs, steps=6, latents=NOISE[:1])
    assert branches(report) == "u22ccc"
    assert torch.equal(found, by_hand(["u", "2", "2", "c keep", "c reuse", "c reuse"]))


# -- null text --------------------------------------------------------------------------------------------


def with_text_exchanged(name: str, text_in: Callable[[int], bool], steps: int) -> torch.Tensor:
    """Run the plain pipeline and hand it the empty prompt's embedding as caption in some steps."""
    pipe = shared(name)
    given = tiny.arguments(pipe, steps=steps)
    negative, positive = given["negative_prompt_embeds"], given["prompt_embeds"]

    def exchange(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": torch.cat([negative, positive if text_in(step + 1) else negative])}

    given["prompt_embeds"] = positive if text_in(0) else negative
    return pipe(**given, callback_on_step_end=exchange, callback_on_step_end_tensor_inputs=["prompt_embeds"]).images


@pytest.mark.parametrize(
    ("spec", "text_in", "expected"),
    [
        ("null_text:after=3", lambda step: step < 3, "222uuu"),
        ("null_text:before=2", lambda step: step >= 2, "uu2222"),
        ("null_text:after=4,before=1", lambda step: 1 <= step < 4, "u222uu"),
        ("null_text:after=0", lambda step: False, "uuuuuu"),
    ],
)
def test_null_text_feeds_the_empty_prompt(spec: str, text_in: Callable[[int], bool], expected: str) -> None:
    found, report = cached_with_report("sd", spec, steps=6)
    assert branches(report) == expected
    assert torch.allclose(found, with_text_exchanged("sd", text_in, 6), atol=1e-3)
    assert not torch.allclose(found, tiny.latents(shared("sd"), steps=6), atol=0.1)
    assert torch.equal(cached("sd", spec, steps=6, latents=NOISE[:1]), by_hand(list(expected)))


def test_null_text_around_deepcache_never_reuses_features_across_the_change() -> None:
    _, report = cached_with_report("sd", "null_text:before=2", "deepcache:interval=3", steps=7)
    region = next(count for count in report.counts if count.kind == "block")
    assert branches(report) == "uu22222"
    # Full at 0, again where the text comes in at 2, then every third step.
    assert (region.stored, region.computed, region.reused, region.missed) == (2, 0, 4, 0) or (
        region.stored + region.computed,
        region.reused,
        region.missed,
    ) == (3, 4, 0)


# -- what becomes of kept tensors -------------------------------------------------------------------------

SLOT, PAIR, COND, UNCOND = (0, 0), ("uncond", "cond"), ("cond",), ("uncond",)


def kept(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(len(values), 1)


@pytest.mark.parametrize(
    ("change", "remaining", "expected"),
    [
        (BranchChange.MEAN, UNCOND, [2.0, 30.0]),
        (BranchChange.MEAN, COND, [2.0, 30.0]),
        (BranchChange.REMAINING, UNCOND, [1.0, 20.0]),
        (BranchChange.REMAINING, COND, [3.0, 40.0]),
        (BranchChange.REFRESH, COND, [3.0, 40.0]),
    ],
)
def test_kept_tensors_follow_the_branches(
    change: BranchChange, remaining: tuple[str, ...], expected: list[float]
) -> None:
    store = Store()
    store.push(SLOT, PAIR, entry(kept(1, 20, 3, 40), kept(1, 20, 3, 40)), 1)
    store.change_branches(remaining, [change], PAIR)
    ((branches, ((tensors, _),)),) = store.read(SLOT, remaining)
    assert branches == remaining
    assert [tensor.flatten().tolist() for tensor in tensors] == [expected, expected]
    # A mean stands for all branches; other histories are kept for each of them.
    other = UNCOND if remaining == COND else COND
    assert store.has(SLOT, other) is store.has(SLOT, PAIR) is (change is not BranchChange.MEAN)
    assert store.bytes == (16 if change is BranchChange.MEAN else 32)


def test_branches_come_and_go() -> None:
    """Each has a history of its own once they have parted, and both are read together again."""
    store = Store()
    store.push(SLOT, PAIR, entry(kept(1.0, 10.0)), 2)
    store.change_branches(COND, [BranchChange.REMAINING], PAIR)
    store.push(SLOT, COND, entry(kept(20.0), step=1), 2)
    store.change_branches(PAIR, [BranchChange.REMAINING], COND)
    found = {branches: [(it.at.step, it.tensors[0].item()) for it in past] for branches, past in store.read(SLOT, PAIR)}
    assert found == {UNCOND: [(0, 1.0)], COND: [(1, 20.0), (0, 10.0)]}
    store.push(SLOT, PAIR, entry(kept(3.0, 30.0), step=2), 2)
    found = {branches: [(it.at.step, it.tensors[0].item()) for it in past] for branches, past in store.read(SLOT, PAIR)}
    assert found == {UNCOND: [(2, 3.0), (0, 1.0)], COND: [(2, 30.0), (1, 20.0)]}


def test_kept_tensors_of_one_branch_are_not_given_to_the_other() -> None:
    store = Store()
    store.push(SLOT, UNCOND, entry(kept(1.0)), 1)
    store.change_branches(COND, [BranchChange.REMAINING], UNCOND)
    assert not store.read(SLOT, COND)
    assert not store.has(SLOT, PAIR)


def test_a_part_that_remains_does_not_hold_the_memory_of_the_whole() -> None:
    store = Store()
    store.push(SLOT, PAIR, entry(kept(1.0, 3.0)), 1)
    store.change_branches(COND, [BranchChange.REMAINING], PAIR)
    ((_, (only,)),) = store.read(SLOT, COND)
    assert only.tensors[0].untyped_storage().nbytes() == 4


def test_bytes_and_their_peak() -> None:
    store = Store()
    store.push(SLOT, PAIR, entry(kept(1.0, 2.0)), 1)
    store.push((1, 0), PAIR, entry(kept(1.0, 2.0), kept(3.0, 4.0)), 2)
    assert (store.bytes, store.peak_bytes) == (24, 24)
    store.push((1, 0), PAIR, entry(kept(3.0, 4.0), kept(5.0, 6.0)), 2)
    assert (store.bytes, store.peak_bytes) == (40, 40)
    store.push((1, 0), PAIR, entry(kept(3.0, 4.0), kept(5.0, 6.0)), 2)  # the oldest goes
    store.drop_newest((1, 0), PAIR)
    assert (store.bytes, store.peak_bytes) == (24, 40)
    store.clear()
    assert (store.bytes, store.peak_bytes) == (0, 40)
    assert not store.has(SLOT, PAIR)


def test_what_guidance_keeps_of_all_branches_stays() -> None:
    store = Store()
    store.push(SLOT, (), entry(kept(1.0)), 1)
    store.change_branches(COND, [BranchChange.REMAINING], PAIR)
    assert store.has(SLOT, ())


def entry(*tensors: torch.Tensor, step: int = 0) -> Entry:
    return Entry(tensors, Time(step))


# -- runs that nobody may touch ---------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["tgate:m=2", "adaptive_guidance:m=2"])
def test_gradients_through_the_denoiser_are_refused(spec: str) -> None:
    unet = tiny.small().unet
    sample = NOISE[:1].clone().requires_grad_(True)
    with cachekit.apply(unet, spec), pytest.raises(GuidanceError, match="gradients"):
        unet(torch.cat([sample] * 2), 500, torch.cat([NEGATIVE, POSITIVE]))
    unet(sample, 500, POSITIVE).sample.sum().backward()
    assert sample.grad is not None


def test_several_steps_in_one_batch_are_refused() -> None:
    unet = tiny.small().unet
    with cachekit.apply(unet, "deepcache"), torch.no_grad(), pytest.raises(GuidanceError, match="several steps"):
        unet(NOISE, torch.tensor([900, 800]), torch.cat([NEGATIVE, POSITIVE]))
