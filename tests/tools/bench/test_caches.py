"""Caches of diffusers and cache-dit as rows of `cachekit bench grid`: models they support, and no trace of them."""

from __future__ import annotations

import functools

import pytest
from support import tiny

from cachekit.tools.bench.caches import Cache, caches_for
from cachekit.tools.bench.cells import Method, Setting
from cachekit.tools.bench.executors import attempt
from cachekit.tools.bench.measuring import timed_call
from cachekit.tools.bench.peers import counting
from cachekit.tools.bench.suite import Suite
from cachekit.upstream.pipelines import denoiser_of

EVERY = "DBCache:Fn_compute_blocks=1,residual_diff_threshold=1e9,max_warmup_steps=2"
STEPS = 8


flux = functools.partial(tiny.flux, layers=(2, 2))


def flux_arguments(prompt):
    text = tiny.text(1)
    return {"prompt_embeds": text, "pooled_prompt_embeds": text[:, 0], "height": 16, "width": 16}


def pixart_arguments(prompt):
    given = tiny.arguments(tiny.pixart())
    return {key: given[key] for key in given if key not in ("generator", "num_inference_steps", "output_type")}


FLUX, PIXART = (flux, flux_arguments), (tiny.pixart, pixart_arguments)
CASES = [
    (FLUX, Method.DIFFUSERS, "FirstBlockCache:threshold=1e9"),
    (FLUX, Method.DIFFUSERS, "TaylorSeerCache:cache_interval=3,disable_cache_before_step=2"),
    (FLUX, Method.DIFFUSERS, "PyramidAttentionBroadcast:spatial_attention_block_skip_range=2"),
    (FLUX, Method.DIFFUSERS, "FasterCache:is_guidance_distilled=true"),
    (FLUX, Method.DIFFUSERS, "MagCache:threshold=0.06,max_skip_steps=3"),
    (FLUX, Method.CACHE_DIT, EVERY),
    (PIXART, Method.CACHE_DIT, EVERY),
]


@pytest.mark.parametrize(("model", "method", "text"), CASES, ids=lambda value: getattr(value, "value", None))
def test_a_cache_acts_on_its_copy_and_leaves_no_trace(model, method, text, capfd):
    make, arguments = model
    pipe = make()
    call, denoiser = type(pipe).__call__, denoiser_of(pipe)
    given = {"num_inference_steps": STEPS, **arguments("a")}
    with counting(denoiser) as uncached:
        plain, _ = timed_call(pipe, dict(given), 1)
    with tiny.leaves_no_trace(pipe):
        cache = Cache(pipe, method, text, arguments)
        result = cache.run(STEPS, "a", 1)
    assert result.image.tobytes() != plain.tobytes()
    assert 0 < result.macs < uncached.macs
    for one in (pipe, cache._twin):
        assert timed_call(one, dict(given), 1)[0].tobytes() == plain.tobytes()
    again = cache.run(STEPS, "a", 1)
    assert (again.image.tobytes(), again.macs) == (result.image.tobytes(), result.macs)
    assert type(pipe).__call__ is call
    assert "experimental" not in capfd.readouterr().err


def test_a_failure_inside_takes_the_cache_off():
    pipe = flux()
    plain, _ = timed_call(pipe, {"num_inference_steps": STEPS, **flux_arguments("a")}, 1)
    wrong = {"prompt_embeds": tiny.text(1)}
    cache = Cache(pipe, Method.DIFFUSERS, "FirstBlockCache:threshold=1e9", lambda prompt: wrong)
    with pytest.raises(ValueError, match="pooled_prompt_embeds"):
        cache.run(STEPS, "a", 1)
    again, _ = timed_call(cache._twin, {"num_inference_steps": STEPS, **flux_arguments("a")}, 1)
    assert again.tobytes() == plain.tobytes()


def names(denoiser, pipeline):
    return [(method.value, text.partition(":")[0]) for method, text in caches_for(denoiser, pipeline)]


def test_a_model_has_rows_of_those_that_support_it():
    assert names(tiny.unet(), "StableDiffusionPipeline") == []
    assert names(tiny.pixart().transformer, "PixArtAlphaPipeline") == [("cache-dit", "DBCache")]
    assert names(tiny.dit().transformer, "NobodysPipeline") == []
    assert names(flux().transformer, "FluxPipeline") == [
        ("diffusers", "FirstBlockCache"),
        ("diffusers", "TaylorSeerCache"),
        ("diffusers", "PyramidAttentionBroadcast"),
        ("diffusers", "FasterCache"),
        ("diffusers", "MagCache"),
        ("cache-dit", "DBCache"),
    ]


def test_their_cells_are_measured_beside_the_uncached_pipeline(tmp_path):
    tiny.pixart().save_pretrained(tmp_path)
    setting = Setting(model=str(tmp_path), captions=("a",), device="cpu", threads=1, height=32, width=32)
    (cell,) = Suite(setting, (), steps=(4,)).cells()
    assert cell.label.startswith("cache-dit: DBCache:Fn_compute_blocks=1,")
    result = attempt(setting, cell)
    assert result.samples[0].uncached_macs == result.samples[0].macs > 0
    assert (result.plan, result.counts) == (None, [])
    assert Suite(setting, (), steps=(4,), peers=False).cells() == []
    impossible = cell.model_copy(update={"specs": ("DBCache:Fn_compute_blocks=99",)})
    assert attempt(setting, impossible).startswith("cache-dit: DBCache:Fn_compute_blocks=99: AssertionError: ")
