"""LoRA, fused projections, textual inversion and edits of a run: no run ever reads what another one kept."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPAGPipeline
from support import tiny
from support.lora import weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import cachekit
from cachekit.models.demo.pipeline import WEIGHTS

STEPS = 4
small = functools.partial(tiny.small, layers_per_block=1)
TGATE, DEEPCACHE = "tgate:m=2", "deepcache:interval=2"
BOTH = (TGATE, DEEPCACHE)
POLICIES = [(TGATE,), (DEEPCACHE,), BOTH]


def draw(pipe: Any, **given: Any) -> torch.Tensor:
    return tiny.latents(pipe, steps=STEPS, **given)


# -- LoRA -------------------------------------------------------------------------------------------------


def load(pipe: Any) -> Any:
    for seed, name in enumerate(("one", "two")):
        # The names of modules are those before the first LoRA took their place.
        pipe.load_lora_weights(weights(small().unet, seed), adapter_name=name)
    return pipe


def switch(pipe: Any, state: str) -> Any:
    if state == "off":
        pipe.disable_lora()
    else:
        pipe.enable_lora()
        pipe.set_adapters(state)
    return pipe


@functools.cache
def loaded() -> Any:
    return load(small())


@functools.cache
def uncached(state: str) -> torch.Tensor:
    return draw(switch(loaded(), state))


@functools.cache
def wanted(specs: tuple[str, ...], state: str) -> torch.Tensor:
    """Draw a single image with an attachment of its own."""
    pipe = switch(loaded(), state)
    with cachekit.apply(pipe, specs) as attachment:
        found = draw(pipe)
        assert sum(count.missed for count in attachment.report().counts) == 0
    return found


@pytest.mark.parametrize("before_apply", [True, False])
@pytest.mark.parametrize("specs", POLICIES, ids="+".join)
def test_runs_under_one_lora_after_the_other(specs: tuple[str, ...], before_apply: bool) -> None:
    pipe = small()
    without = draw(pipe)
    if before_apply:
        load(pipe)
    with cachekit.apply(pipe, specs):
        if not before_apply:
            load(pipe)
        for state in ("one", "two", "off", "one"):
            assert torch.equal(draw(switch(pipe, state)), wanted(specs, state))
        pipe.delete_adapters("one")
        assert torch.equal(draw(switch(pipe, "two")), wanted(specs, "two"))
        pipe.unload_lora_weights()
        assert torch.equal(draw(pipe), wanted(specs, "off"))
    assert torch.equal(draw(pipe), without)
    assert not torch.allclose(wanted(specs, "one"), wanted(specs, "two"), atol=1e-2)
    assert not torch.allclose(wanted(specs, "one"), uncached("one"), atol=1e-3)


@pytest.mark.parametrize("specs", POLICIES, ids="+".join)
def test_a_lora_is_fused_and_taken_out_again(specs: tuple[str, ...]) -> None:
    pipe = switch(load(small()), "one")
    with cachekit.apply(pipe, specs):
        pipe.fuse_lora(adapter_names=["one"])
        first = draw(pipe)
        assert torch.allclose(first, wanted(specs, "one"), atol=1e-2)
    fused = draw(pipe)
    assert torch.allclose(fused, uncached("one"), atol=1e-2)
    with cachekit.apply(pipe, specs):
        assert torch.equal(draw(pipe), first)
        pipe.unfuse_lora()
        assert torch.allclose(draw(pipe), wanted(specs, "one"), atol=1e-2)
    assert not torch.allclose(first, fused, atol=1e-2)


def test_a_lora_stays_when_the_policies_go() -> None:
    pipe = small()
    attachment = cachekit.apply(pipe, BOTH)
    switch(load(pipe), "two")
    attachment.remove()
    assert torch.equal(draw(pipe), uncached("two"))


# -- attention --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before_apply", [True, False])
@pytest.mark.parametrize("specs", POLICIES, ids="+".join)
def test_fused_projections(specs: tuple[str, ...], before_apply: bool) -> None:
    pipe = small()
    with cachekit.apply(pipe, specs):
        separate = draw(pipe)
    without = draw(pipe)
    if before_apply:
        pipe.fuse_qkv_projections()
    with cachekit.apply(pipe, specs) as attachment:
        if not before_apply:
            pipe.fuse_qkv_projections()
        first = draw(pipe)
        assert torch.allclose(first, separate, atol=1e-2)
        assert sum(count.missed for count in attachment.report().counts) == 0
    fused = draw(pipe)
    assert torch.allclose(fused, without, atol=1e-2)
    assert not torch.allclose(first, fused, atol=1e-2)
    with cachekit.apply(pipe, specs):
        assert torch.equal(draw(pipe), first)
        pipe.unfuse_qkv_projections()
        assert torch.equal(draw(pipe), separate)
    assert torch.equal(draw(pipe), without)


def with_perturbed_attention() -> Any:
    pipe = StableDiffusionPAGPipeline(**small().components, requires_safety_checker=False, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(("spec", "scale"), [(DEEPCACHE, 3.0), (TGATE, 0.0), (DEEPCACHE, 0.0)])
def test_processors_that_a_pipeline_exchanges_within_its_call(spec: str, scale: float) -> None:
    pipe = with_perturbed_attention()
    own = dict(pipe.unet.attn_processors)
    without = draw(pipe, pag_scale=scale)
    with cachekit.apply(pipe, spec) as attachment:
        first = draw(pipe, pag_scale=scale)
        assert pipe.unet.attn_processors == own
        assert sum(count.reused for count in attachment.report().counts) > 0
        assert sum(count.missed for count in attachment.report().counts) == 0
        draw(pipe, pag_scale=3.0 - scale) if spec == DEEPCACHE else None
        assert torch.equal(draw(pipe, pag_scale=scale), first)
    assert not torch.allclose(first, without, atol=1e-3)
    assert torch.equal(draw(pipe, pag_scale=scale), without)


# -- what changes between and within runs -----------------------------------------------------------------


@tiny.reproducible
def with_text() -> Any:
    pipe = small()
    pipe.tokenizer = CLIPTokenizer.from_pretrained(WEIGHTS / "unet" / "tokenizer")
    size = {"hidden_size": tiny.WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {name: getattr(pipe.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    length = pipe.tokenizer.model_max_length
    config = CLIPTextConfig(**size, **tokens, vocab_size=len(pipe.tokenizer), max_position_embeddings=length)
    pipe.text_encoder = CLIPTextModel(config).eval()
    return pipe


def say(pipe: Any, prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=STEPS, generator=generator, output_type="latent").images


@pytest.mark.parametrize("specs", POLICIES, ids="+".join)
def test_a_text_learned_between_runs(specs: tuple[str, ...]) -> None:
    pipe = with_text()
    prompt = "a red <new> circle"
    learned = {"<new>": torch.full((1, tiny.WIDTH), 2.0)}
    with cachekit.apply(pipe, specs):
        before = say(pipe, prompt)
        pipe.load_textual_inversion(learned)
        after = say(pipe, prompt)
        assert torch.equal(say(pipe, prompt), after)
        pipe.unload_textual_inversion()
        assert torch.equal(say(pipe, prompt), before)
    assert not torch.equal(after, before)
    pipe.load_textual_inversion(learned)
    with cachekit.apply(pipe, specs):
        assert torch.equal(say(pipe, prompt), after)


def stop_guidance(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Do what diffusers' documents show for guidance that ends early."""
    if step == 1:
        pipe._guidance_scale = 0.0
        given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
    return given


def other_text(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    if step == 1:
        given["prompt_embeds"] = given["prompt_embeds"].flip(1)
    return given


def other_latents(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"latents": given["latents"] * 1.1}


def interrupt(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
    pipe._interrupt = step == 1
    return given


@pytest.mark.parametrize("edit", [stop_guidance, other_text, other_latents, interrupt])
@pytest.mark.parametrize("specs", [(DEEPCACHE,), ("tgate:m=3",), ("tgate:m=3", DEEPCACHE)], ids="+".join)
def test_a_run_edited_from_within_leaves_the_next_one_clean(specs: tuple[str, ...], edit: Any) -> None:
    pipe = small()
    given = {"callback_on_step_end": edit, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    without, edited = draw(pipe), draw(pipe, **given)
    with cachekit.apply(pipe, specs) as attachment:
        clean = draw(pipe)
        first = draw(pipe, **given)
        report = attachment.report()
        assert report.steps == report.calls == (2 if edit is interrupt else STEPS)
        batches = [made.batch for made in report.record.calls]
        assert batches == ([2, 2, 1, 1] if edit is stop_guidance else [2] * report.calls)
        assert torch.equal(draw(pipe, **given), first)
        assert torch.equal(draw(pipe), clean)
    # Two steps of three are as without any policy but for deep features.
    assert torch.equal(first, edited) == (edit is interrupt and DEEPCACHE not in specs)
    assert not torch.equal(first, clean)
    assert torch.equal(draw(pipe), without)
