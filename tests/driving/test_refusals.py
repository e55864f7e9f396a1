"""What a pipeline's arguments show to be unfit is refused at its call, before anything is touched."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import diffusers
import pytest
import torch
from diffusers import PixArtSigmaPAGPipeline, StableDiffusionPAGPipeline, StableDiffusionSAGPipeline, UVit2DModel
from diffusers.modular_pipelines import ModularPipeline
from support import tiny
from support.modular import draw, modular

import cachekit
from cachekit import AdapterError, CalibrationError, GuidanceError
from cachekit.upstream.pipelines import denoiser_of

NARROWING = "adaptive_guidance:m=2"


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def perturbed() -> Any:
    parts = tiny.small().components
    return silent(StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["mid"]))


def perturbed_transformer() -> Any:
    return silent(PixArtSigmaPAGPipeline(**tiny.pixart(sigma=True).components, pag_applied_layers=["blocks.1"]))


def attending() -> Any:
    return silent(StableDiffusionSAGPipeline(**tiny.small().components, requires_safety_checker=False))


@contextmanager
def untouched(pipe: Any) -> Any:
    """Expect a refusal before the denoiser is called, or given other attention processors."""
    denoiser = denoiser_of(pipe)
    calls: list[Any] = []
    processors = {name: id(one) for name, one in denoiser.attn_processors.items()}
    hook = denoiser.register_forward_pre_hook(lambda *given: calls.append(given))
    with pytest.raises(GuidanceError) as refused:
        yield refused
    hook.remove()
    assert calls == []
    assert {name: id(one) for name, one in denoiser.attn_processors.items()} == processors
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("make", [perturbed, perturbed_transformer])
def test_perturbed_attention(make: Any) -> None:
    pipe = make()
    plain = tiny.latents(pipe, pag_scale=3.0)
    with cachekit.apply(pipe, NARROWING), untouched(pipe) as refused:
        tiny.latents(pipe, pag_scale=3.0)
    assert "set pag_scale=0" in str(refused.value)
    assert torch.equal(tiny.latents(pipe, pag_scale=3.0), plain)


@pytest.mark.parametrize("given", [{"pag_scale": 0.0}, {"pag_scale": 3.0, "guidance": 1.0}])
def test_without_a_third_branch_it_runs(given: dict[str, Any]) -> None:
    pipe = perturbed()
    with cachekit.apply(pipe, NARROWING) as attachment:
        tiny.latents(pipe, **given)
        assert attachment.report().steps == 6


def test_a_policy_that_keeps_all_branches_is_served() -> None:
    pipe = perturbed()
    with cachekit.apply(pipe, "deepcache:interval=2") as attachment:
        tiny.latents(pipe, pag_scale=3.0)
        assert sum(count.reused for count in attachment.report().counts) > 0


def test_attention_that_is_read_in_every_step() -> None:
    pipe = attending()
    with cachekit.apply(pipe, "deepcache:interval=2"):
        with untouched(pipe) as refused:
            tiny.latents(pipe, sag_scale=0.75)
        assert "set sag_scale=0" in str(refused.value)
        tiny.latents(pipe, sag_scale=0.0)


@pytest.mark.skipif(
    tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 42),
    reason="modular pipelines of earlier releases take no models that are made in memory",
)
def test_guidance_with_a_memory() -> None:
    from diffusers.guiders import AdaptiveProjectedGuidance

    pipe: ModularPipeline = modular(AdaptiveProjectedGuidance(5.0, adaptive_projected_guidance_momentum=-0.5))
    with cachekit.apply(pipe, NARROWING), untouched(pipe) as refused:
        draw(pipe)
    assert "set its momentum to None" in str(refused.value)


@pytest.mark.parametrize(
    ("make", "given", "specs"),
    [(perturbed, {"pag_scale": 3.0}, NARROWING), (attending, {"sag_scale": 0.75}, "deepcache:interval=2")],
)
def test_nothing_is_refused_in_a_paused_block(make: Any, given: dict[str, Any], specs: str) -> None:
    pipe = make()
    plain = tiny.latents(pipe, **given)
    with cachekit.apply(pipe, specs) as attachment, attachment.paused():
        assert torch.equal(tiny.latents(pipe, **given), plain)


def test_a_paused_block_that_ends_in_mid_run_is_no_way_around_a_refusal() -> None:
    pipe = attending()
    with cachekit.apply(pipe, "deepcache:interval=2") as attachment:
        pause = attachment.paused()
        pause.__enter__()

        def go_on(step: int, timestep: Any, latents: Any) -> None:
            if step == 1:
                pause.__exit__(None, None, None)

        with pytest.raises(GuidanceError, match="set sag_scale=0"):
            tiny.latents(pipe, sag_scale=0.75, callback=go_on)


def test_a_run_that_was_refused_leaves_the_last_report() -> None:
    pipe = perturbed()
    with cachekit.apply(pipe, NARROWING) as attachment:
        tiny.latents(pipe, pag_scale=0.0)
        report = attachment.report()
        with untouched(pipe):
            tiny.latents(pipe, pag_scale=3.0)
        assert attachment.report() is report
        assert attachment.driver.state.run is None
        tiny.latents(pipe, pag_scale=0.0)
        assert attachment.report() is not report


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (perturbed, {"pag_scale": 3.0}),
        (perturbed, {"pag_scale": 3.0, "guidance": 1.0}),
        (perturbed_transformer, {"pag_scale": 3.0}),
        (perturbed_transformer, {"pag_scale": 3.0, "guidance": 1.0}),
        (attending, {"sag_scale": 0.0}),
    ],
)
def test_a_refusal_within_the_loop_leaves_the_processors_of_before(make: Any, given: dict[str, Any]) -> None:
    """Whether a calibration serves a run is known once the loop has begun, with the pipeline's processors in place."""
    pipe = make()
    denoiser = denoiser_of(pipe)
    processors = {name: id(one) for name, one in denoiser.attn_processors.items()}
    with cachekit.apply(pipe, "calibrated:interval=2"):
        with pytest.raises(CalibrationError, match=r"no calibration ships|no guidance") as refused:
            tiny.latents(pipe, **given)
        assert len(str(refused.value).splitlines()) == 1
        assert {name: id(one) for name, one in denoiser.attn_processors.items()} == processors


def token_model() -> tuple[Any, dict[str, Any]]:
    """The denoiser of aMUSEd, which is called with tokens, and a call of it."""
    sizes = {"hidden_size": 8, "cond_embed_dim": 8, "encoder_hidden_size": 8, "block_out_channels": 8, "sample_size": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "block_num_heads": 2, "intermediate_size": 16}
    tokens = {"micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20, "vocab_size": 20, "codebook_size": 16}
    given = {"input_ids": torch.zeros(1, 8, 8, dtype=torch.long), "micro_conds": torch.ones(1, 5)}
    texts = {"encoder_hidden_states": torch.ones(1, 4, 8), "pooled_text_emb": torch.ones(1, 8)}
    return UVit2DModel(**sizes, **heads, **tokens).eval(), {**given, **texts}


def without_a_timestep() -> tuple[Any, dict[str, Any]]:
    return tiny.unet(), {"sample": torch.zeros(1, 4, 16, 16), "encoder_hidden_states": tiny.text(1)}


@pytest.mark.parametrize(("make", "missing"), [(token_model, "sample"), (without_a_timestep, "timestep")])
def test_a_denoiser_whose_steps_cannot_be_told_apart(make: Any, missing: str) -> None:
    """Nothing is left out by a count of calls: the first one is refused before anything is computed."""
    denoiser, given = make()
    computed: list[Any] = []
    watch = next(denoiser.children()).register_forward_pre_hook(lambda *inputs: computed.append(inputs))
    with cachekit.apply(denoiser, "forecast:interval=2"):
        for _ in range(3):
            with pytest.raises(AdapterError) as refused:
                denoiser(**given)
            assert str(refused.value).startswith(f"{type(denoiser).__name__} is called without a {missing} (")
            assert str(refused.value).endswith("so its steps cannot be identified; call cachekit.remove(pipe)")
    assert computed == []
    if missing == "sample":
        denoiser(**given)
        assert computed != []
    watch.remove()
