"""Kinds of sites, spans across chains and residuals at plain sites, on tiny pipelines against naive replays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from support import tiny

import cachekit
from cachekit.registry.catalog import installed
from cachekit.upstream.arguments import parameters_of
from cachekit.upstream.attention import streams_of_site

STEPS = 6
latents = functools.partial(tiny.latents, steps=STEPS)


def site_map(pipe: Any) -> Any:
    denoiser = tiny.denoiser_of(pipe)
    return installed().adapter_for(denoiser).sites(denoiser)


def names(pipe: Any, kind: str) -> list[str]:
    return [site.name for site in site_map(pipe).of(cachekit.Kind(kind))]


def test_attention_over_frames_is_a_kind_of_its_own() -> None:
    pipe = tiny.svd()
    temporal = names(pipe, "temporal_attention")
    assert temporal
    assert all(".temporal_transformer_blocks." in name and name.endswith("attn1") for name in temporal)
    assert not any("temporal" in name for name in names(pipe, "self_attention"))


@pytest.mark.parametrize("make", [tiny.sd, tiny.pixart, tiny.wan])
def test_projections_of_the_text_are_exact_to_reuse(make: Any) -> None:
    pipe = make()
    found = names(pipe, "text_key_value")
    assert len(found) == 2 * len(names(pipe, "cross_attention"))
    plain, ran = latents(pipe), []
    module = tiny.denoiser_of(pipe).get_submodule(found[0])
    module.register_forward_hook(lambda *_: ran.append(1))
    latents(pipe)
    uncached = len(ran)
    ran.clear()
    with cachekit.apply(pipe, "cache:where=text_key_value,when=every(1000),what=reuse"):
        assert torch.equal(latents(pipe), plain)
    assert len(ran) * STEPS == uncached
    assert torch.equal(latents(pipe), plain)


def under(pipe: Any, state: str) -> Any:
    """Have one LoRA act, or none."""
    for layer in (module for module in tiny.denoiser_of(pipe).modules() if isinstance(module, BaseTunerLayer)):
        layer.enable_adapters(state != "off")
        if state != "off":
            layer.set_adapter(state)
    return pipe


@pytest.mark.parametrize("make", [tiny.sd, tiny.pixart])
def test_projections_with_a_lora(make: Any) -> None:
    """What a LoRA adds to a projection is kept with it, and is not read once another one acts."""
    pipe = make()
    denoiser, found, without = tiny.denoiser_of(pipe), names(pipe, "text_key_value"), latents(pipe)
    for name in ("one", "two"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=found, init_lora_weights=False), denoiser, name)
    states = ["one", "two", "off", "one"]
    assert names(pipe, "text_key_value") == found
    with cachekit.apply(pipe, "cache:where=text_key_value,when=after(1)"):
        drawn = [latents(under(pipe, state)) for state in states]
    for state, image in zip(states, drawn):
        assert torch.equal(latents(under(pipe, state)), image)
    assert torch.equal(drawn[2], without)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)


def test_a_lora_that_takes_the_place_of_a_projection_is_refused_until_policies_are_applied_again() -> None:
    pipe = tiny.sd()
    found = names(pipe, "text_key_value")
    spec = "cache:where=text_key_value,when=after(1)"
    attachment = cachekit.apply(pipe, spec)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=found, init_lora_weights=False), pipe.unet)
    with pytest.raises(cachekit.AttachmentError, match=r"replaced '.*attn2\.to_k' .* and apply again$"):
        latents(pipe)
    attachment.remove()
    plain = latents(pipe)
    with cachekit.apply(pipe, spec):
        assert torch.equal(latents(pipe), plain)


def test_projections_inside_reused_attention() -> None:
    pipe = tiny.pixart()
    with cachekit.apply(pipe, "tgate:m=3"):
        alone = latents(pipe)
    with cachekit.apply(pipe, ["tgate:m=3", "cache:where=text_key_value,when=every(1000),what=reuse"]):
        assert torch.equal(latents(pipe), alone)


def test_the_mlp_of_single_blocks_is_a_site() -> None:
    pipe = tiny.flux()
    single = len(pipe.transformer.single_transformer_blocks)
    assert sum(name.endswith("proj_mlp") for name in names(pipe, "feed_forward")) == single


class Naive:
    """Runs everything, and replaces what leaves by what entered plus the residual of the last full step."""

    def __init__(self, first: Any, last: Any, streams: tuple[str, ...], interval: int, calls: int) -> None:
        self.streams, self.interval, self.calls, self.count, self.kept = streams, interval, calls, -1, {}
        self.parameters = parameters_of(first)
        first.register_forward_pre_hook(self.enter, with_kwargs=True)
        last.register_forward_hook(self.leave)

    def enter(self, _: Any, args: Any, kwargs: Any) -> None:
        given = {**dict(zip(self.parameters, args)), **kwargs}
        self.entry = [given[name] for name in self.streams]
        self.count += 1

    def leave(self, _module: Any, _inputs: Any, output: Any) -> Any:
        left = output if isinstance(output, tuple) else (output,)
        step, branch = divmod(self.count, self.calls)
        if step % self.interval == 0:
            self.kept[branch] = [out - into for out, into in zip(left, self.entry)]
            return None
        made = tuple(into + added for into, added in zip(self.entry, self.kept[branch]))
        return made if isinstance(output, tuple) else made[0]


MAKERS = {
    "flux": (tiny.flux, 1), "flux-embedded": (functools.partial(tiny.flux, guidance_embeds=True), 1),
    "wan": (tiny.wan, 2), "pixart": (tiny.pixart, 1), "sd": (tiny.sd, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ["flux", "flux-embedded", "wan", "pixart"])
def test_a_span_over_all_chains_equals_a_naive_replay(name: str) -> None:
    make, calls = MAKERS[name]
    pipe, by_hand = make(), make()
    regions = site_map(pipe).join(1)
    assert len(regions) == 1
    for region in regions:
        modules = dict(by_hand.transformer.named_modules())
        Naive(modules[region.entry], modules[region.exit], region.streams, 2, calls)
    plain = latents(pipe)
    with cachekit.apply(pipe, "cache:where=span(first=1,chain=all),when=every(2),what=reuse(of=residual)"):
        cached = latents(pipe)
    assert torch.equal(cached, latents(by_hand))
    assert not torch.equal(cached, plain)
    assert torch.equal(latents(pipe), plain)


@pytest.mark.parametrize("kind", ["feed_forward", "self_attention", "joint_attention"])
@pytest.mark.parametrize("name", ["sd", "pixart", "flux"])
def test_a_residual_at_plain_sites_equals_a_naive_replay(name: str, kind: str) -> None:
    make, calls = MAKERS[name]
    pipe, by_hand = make(), make()
    found = names(pipe, kind)
    if not found or (name, kind) == ("flux", "feed_forward"):  # refused: see the next test
        pytest.skip("no such sites")
    for site in found:
        module = tiny.denoiser_of(by_hand).get_submodule(site)
        Naive(module, module, streams_of_site(module, cachekit.Kind(kind)), 2, calls)
    with cachekit.apply(pipe, f"cache:where={kind},when=every(2),what=reuse(of=residual)"):
        cached = latents(pipe)
    assert torch.equal(cached, latents(by_hand))


@pytest.mark.parametrize(
    ("make", "kind", "site"),
    [
        (tiny.flux, "feed_forward", "single_transformer_blocks.0.proj_mlp"),
        (tiny.sd, "text_key_value", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"),
    ],
)
def test_layers_that_change_the_width_have_no_residual(make: Callable[[], Any], kind: str, site: str) -> None:
    pipe, spec = make(), f"cache:where={kind},what=reuse(of=residual)"
    refusal = (
        f"{spec}: '{site}' has no residual, its output is not as wide as its input; use of=output or another place"
    )
    with tiny.leaves_no_trace(pipe), pytest.raises(cachekit.SiteError) as caught:
        cachekit.apply(pipe, spec)
    assert str(caught.value) == refusal
    cachekit.apply(pipe, f"cache:where={kind}").remove()


def test_the_features_of_a_unet_leave_its_last_up_block() -> None:
    (region,) = cachekit.Features().find(site_map(tiny.sdxl()))
    assert (region.exit, region.skipped[0], region.streams) == ("up_blocks.2", "down_blocks.0", ())
    assert region.encoder == ("down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block")
    (region,) = cachekit.Features().find(site_map(tiny.flux()))
    assert (region.entry, region.exit) == ("transformer_blocks.0", "single_transformer_blocks.3")


def test_spans_beyond_all_chains_are_refused() -> None:
    with pytest.raises(cachekit.SiteError, match=r"have blocks 0\.\.5; give a span within them"):
        cachekit.apply(tiny.flux(), "cache:where=span(first=9,chain=all),when=every(2),what=reuse")
