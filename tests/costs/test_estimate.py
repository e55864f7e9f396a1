"""Estimates run the real engine on the meta device, and agree with published figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler
from support import tiny

import cachekit
from cachekit.amounts import macs, size
from cachekit.costs.counting import Known, count_forward
from cachekit.costs.estimate import Estimator
from cachekit.errors import CachekitError
from cachekit.models.architectures import architecture, architecture_of
from cachekit.tools.bench.paper import tables
from cachekit.upstream.pipelines import denoiser_of

TABLES = tables()
# One row per model and per kind of composition; benchmarks/paper.py rebuilds them all.
CHOSEN = {
    ("sd15", "tgate:m=5"),
    ("sdxl", "tgate:m=13", "deepcache:interval=3,branch=1"),
    ("lcm-sdxl", "tgate:m=1"),
    ("pixart-alpha", "tgate:m=8"),
    ("pixart-alpha", "adaptive_guidance:m=10"),
    ("pixart-alpha", "tgate:m=15,sp_interval=3,fi_interval=1,warm_up=2"),
    ("pixart-sigma",),
    ("lcm-pixart", "tgate:m=2"),
}
ROWS = [row for row in TABLES["rows"] if (row["model"], *row["specs"]) in CHOSEN]
# The papers' SD rows lie 0.04 % above an exact count.
TOLERANCE = {"sd15": 5e-4, "sd21": 5e-4}


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row['model']}-{'+'.join(row['specs']) or 'plain'}-{row['steps']}"
)
def test_published_macs(row: dict) -> None:
    found = cachekit.estimate(row["model"], row["specs"], num_inference_steps=row["steps"])
    assert found.macs / 1e12 == pytest.approx(row["macs_T"], rel=TOLERANCE.get(row["model"], 1e-4))


@pytest.mark.parametrize(("model", "specs", "macs"), TABLES["exact"])
def test_exact_macs_of_one_branch(model: str, specs: list[str], macs: int) -> None:
    last = cachekit.estimate(model, specs, num_inference_steps=2, guided=False).steps[-1]
    assert last.macs == macs


@pytest.mark.parametrize(("model", "before", "after"), TABLES["params"])
def test_parameters_of_the_final_phase(model: str, before: int, after: int) -> None:
    found = cachekit.estimate(model, "tgate:m=2", num_inference_steps=4)
    assert (found.baseline_params, found.params) == (before, after)


def test_deepcache_keeps_a_tenth_of_what_the_published_helper_keeps() -> None:
    from DeepCache import DeepCacheSDHelper

    unet, inputs = architecture("sdxl").build(), architecture("sdxl").inputs(2)
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=2, cache_branch_id=0)
    helper.enable()
    inputs.pop("timestep")
    with torch.no_grad():
        unet(inputs.pop("sample"), scheduler.timesteps[0], **inputs)
    kept = {id(t): t.numel() * t.element_size() for t in _tensors(helper.cached_output)}
    ours = cachekit.estimate("sdxl", "deepcache:interval=2", num_inference_steps=4).cache_bytes
    assert 0 < ours <= sum(kept.values()) / 10


def _tensors(tree: object) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    values = tree.values() if isinstance(tree, dict) else tree
    return [tensor for value in values for tensor in _tensors(value)]


def test_the_estimate_of_a_pipeline_agrees_with_the_report_of_its_run() -> None:
    pipe = tiny.sd()
    specs = ["tgate:m=3", "deepcache:interval=2"]
    with cachekit.apply(pipe, specs) as attachment:
        tiny.latents(pipe, steps=6)
        report = attachment.report()
    found = cachekit.estimate(pipe, specs, num_inference_steps=6, height=32, width=32)
    assert found.baseline_macs > found.macs > 0
    assert (len(found.steps), found.cache_bytes > 0) == (6, True)
    ratio = found.macs / found.baseline_macs
    assert ratio == pytest.approx(report.macs / report.baseline_macs, rel=0.05)


def test_the_scheduler_of_a_pipeline_gives_the_iterations_and_their_times() -> None:
    pipe = tiny.small()
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    spec = "cache:where=cross_attention,when=window(low=500,high=1000)"
    with cachekit.apply(pipe, spec) as attachment:
        plan = attachment.plan(6)
        tiny.latents(pipe, steps=6)
        report = attachment.report()
    found = cachekit.estimate(pipe, spec, num_inference_steps=6, height=32, width=32)
    assert (found.plan.rows, len(found.steps)) == (plan.rows, 11)
    assert found.plan.is_static
    assert found.mac_reduction == pytest.approx(report.mac_reduction, rel=0.02)
    assert report.mac_reduction > 1
    assert len(cachekit.estimate(pipe.unet, spec, num_inference_steps=6).steps) == 6


def test_an_estimate_is_a_line_and_a_table() -> None:
    found = cachekit.estimate(tiny.small(), "tgate:m=2", num_inference_steps=4)
    costs = f"{macs(found.macs)} of {macs(found.baseline_macs)}, {found.mac_reduction:.2f}x MAC reduction"
    assert repr(found) == f"<Estimate: {costs}, {size(found.cache_bytes)} kept, 4 steps>"
    page = found._repr_html_()
    assert f"<th>4 steps, {found.mac_reduction:.2f}x MAC reduction</th><th>uncached</th><th>cached</th>" in page
    assert f"<td>{macs(found.baseline_macs)}</td><td>{macs(found.macs)}</td>" in page


def test_pixels_per_latent_come_from_the_pipeline() -> None:
    pipe = tiny.sd()
    assert pipe.vae_scale_factor == 2
    own = cachekit.estimate(pipe, num_inference_steps=2)
    assert cachekit.estimate(pipe, num_inference_steps=2, height=32, width=32).macs == own.macs
    assert cachekit.estimate(pipe.unet, num_inference_steps=2, height=128, width=128).macs == own.macs
    with pytest.raises(CachekitError, match="a size of 31 pixels: give a multiple of 2"):
        cachekit.estimate(pipe, num_inference_steps=2, height=31)


def test_estimating_leaves_the_pipeline_as_it_was() -> None:
    pipe = tiny.sd()
    before = tiny.latents(pipe)
    cachekit.estimate(pipe, "tgate:m=2", num_inference_steps=4)
    assert torch.equal(before, tiny.latents(pipe))


def test_unknown_model_names_the_nearest() -> None:
    with pytest.raises(CachekitError, match=r"unknown model 'sdlx'.*did you mean 'sdxl'"):
        cachekit.estimate("sdlx", "tgate:m=2")


def test_costs_are_the_same_in_inference_mode() -> None:
    pipe = tiny.pixart()
    with cachekit.apply(pipe, "tgate:m=2") as attachment:
        tiny.latents(pipe, steps=3)
        expected = attachment.report().cost
        estimated = cachekit.estimate(pipe, "tgate:m=2", num_inference_steps=3)
        with torch.inference_mode():
            tiny.latents(pipe, steps=3)
            assert attachment.report().cost == expected
            assert cachekit.estimate(pipe, "tgate:m=2", num_inference_steps=3) == estimated


class Then(torch.nn.Module):
    """Pass the output of a linear layer to a function."""

    def __init__(self, then: Any) -> None:
        super().__init__()
        self.layer, self.then = torch.nn.Linear(4, 4, device="meta"), then

    def forward(self, sample: torch.Tensor) -> Any:
        return self.then(self.layer(sample))


class Wrapped(torch.Tensor):
    """A tensor that holds another, as quantised weights do."""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=held.device)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(func(*(one.held if isinstance(one, cls) else one for one in args), **(kwargs or {})))


def test_shapes_that_depend_on_values_or_classes_are_not_taken_from_others() -> None:
    lengths, kinds = [], []

    def then(output: torch.Tensor) -> None:
        lengths.extend(len(output[torch.tensor([True, is_all])]) for is_all in (False, True))
        kinds.extend(type(one + 1) for one in (output, Wrapped(output), output, Wrapped(output)))

    forward = count_forward(Then(then), (torch.empty(2, 4, device="meta"),), {})
    assert (lengths, kinds) == ([1, 2], [torch.Tensor, Wrapped] * 2)
    assert forward.macs == 2 * 4 * 4


def test_attention_without_a_known_formula_counts_nothing() -> None:
    library = torch.library.Library("cachekit_test", "DEF")
    library.define("attention(Tensor query) -> Tensor")
    library.impl("attention", torch.empty_like, "Meta")
    given = torch.empty(2, 4, device="meta")
    forward = count_forward(Then(torch.ops.cachekit_test.attention), (given,), {})
    assert (forward.macs, forward.attention_macs) == (2 * 4 * 4, 0)


@pytest.mark.parametrize("name", ["small", "pixart", "flux"])
def test_what_is_known_of_a_model_counts_the_same(name: str) -> None:
    denoiser = denoiser_of(getattr(tiny, name)()).to("meta")
    arguments, known = architecture_of(denoiser).inputs(2, dtype=torch.float32), Known()
    expected = count_forward(denoiser, (), arguments)
    assert expected.macs
    assert [count_forward(denoiser, (), arguments, known) for _ in range(2)] == [expected] * 2
    assert known.modules
    assert not any("forward" in vars(module) for module in denoiser.modules())


def test_an_estimator_gives_what_single_estimates_give() -> None:
    pipe = tiny.pixart()
    estimator = Estimator.of(pipe)
    for specs in ("tgate:m=3", "fora:interval=2", [], ["forecast:interval=2"], "tgate:m=3"):
        assert estimator(specs, 6) == cachekit.estimate(pipe, specs, num_inference_steps=6)
