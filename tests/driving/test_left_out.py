"""Calls of the denoiser that are left out: in every way in which pipelines make calls."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image
from support import tiny
from torch import nn

import cachekit
from cachekit import (
    OPEN,
    Action,
    Choice,
    Every,
    Guidance,
    History,
    Moment,
    Policy,
    Reuse,
    StandIn,
    Streams,
    WholeDenoiser,
)
from cachekit.errors import CachekitError, PolicyError, SiteError, SpecError
from cachekit.tools.coverage.building import arguments, build

STEPS = 8
FORECAST = "forecast:interval=3"


def drawn(pipe: Any, *specs: Any, **call: Any) -> tuple[torch.Tensor, Any]:
    with cachekit.apply(pipe, specs) as attachment:
        return tiny.latents(pipe, **{"steps": STEPS, **call}), attachment.report()


def calls_of(module: nn.Module) -> list[int]:
    """Count the calls of a module's forward from now on."""
    made: list[int] = []
    module.register_forward_pre_hook(lambda *_: made.append(1))
    return made


# -- what is left out ------------------------------------------------------------------------------------------


def test_a_controlnet_is_left_out_with_the_denoiser() -> None:
    pipe = tiny.controlled(2)
    uncached = tiny.latents(pipe, steps=STEPS)
    made = [calls_of(net) for net in (*pipe.controlnet.nets, pipe.unet)]
    cached, report = drawn(pipe, FORECAST)
    full = len([step for step in range(STEPS) if step % 3 == 0 or step == STEPS - 1])
    assert [len(calls) for calls in made] == [full] * 3
    assert report.record.shortened == 2 * (STEPS - full)
    assert torch.isfinite(cached).all()
    assert torch.equal(tiny.latents(pipe, steps=STEPS), uncached)


def test_two_denoisers_have_histories_apart_and_the_late_one_begins_anew() -> None:
    pipe, steps = tiny.wan(boundary=0.85), 10
    uncached = tiny.latents(pipe, steps=steps)
    first, second = (calls_of(module) for module in (pipe.transformer, pipe.transformer_2))
    with cachekit.apply(pipe, FORECAST) as attachment:
        cached, report = tiny.latents(pipe, steps=steps), attachment.report()
    by_step = [(call.denoiser, call.left_out) for call in report.record.calls[::2]]
    begin = next(step for step, (name, _) in enumerate(by_step) if name == "transformer_2")
    assert begin % 3
    assert begin < steps - 3
    left_out = [step for step in range(begin, steps - 1) if (step - begin) % 3]
    assert by_step[begin:] == [("transformer_2", step in left_out) for step in range(begin, steps)]
    assert sum(count.missed for count in report.counts) == 0
    assert [len(first), len(second)] == [
        2 * sum(name == it and not out for it, out in by_step) for name in ("transformer", "transformer_2")
    ]
    assert not torch.equal(cached, uncached)
    assert torch.equal(tiny.latents(pipe, steps=steps), uncached)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler])
def test_schedulers_with_several_calls_a_step(scheduler: Any) -> None:
    """Their timesteps repeat, so that a line in sigma would divide by nothing."""
    pipe = tiny.small()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    plain = tiny.latents(pipe, steps=STEPS)
    by_step, report = drawn(pipe, "cache:where=denoiser,when=every(2,last=true),what=linear")
    by_sigma, _ = drawn(pipe, "cache:where=denoiser,when=every(2,last=true),what=linear(axis=sigma)")
    assert report.left_out > STEPS // 3
    assert torch.isfinite(by_sigma).all()
    assert not torch.equal(by_step, plain)
    assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)


class Pair(nn.Module):
    """A denoiser with two outputs, in a tuple within a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])
        self.calls = 0

    def forward(self, sample: torch.Tensor, timestep: Any) -> Any:
        self.calls += 1
        return sample * float(timestep), (sample[:, :1] - float(timestep),)


class OfPairs:
    name, summary = "pairs", "pairs"

    def matches(self, denoiser: Any) -> bool:
        return isinstance(denoiser, Pair)

    def sites(self, denoiser: Any) -> Any:
        return cachekit.SiteMap("Pair", ())

    def layout(self, denoiser: Any) -> Any:
        return cachekit.Layout()


def test_every_tensor_of_an_output_is_predicted_on_a_ramp_exactly() -> None:
    import dataclasses

    from cachekit.registry.catalog import installed

    denoiser, table = Pair(), torch.arange(9.0)
    catalog = dataclasses.replace(installed(), adapters={"pairs": OfPairs()})
    sample = torch.ones(1, 2, 3)
    with cachekit.apply(denoiser, "forecast:interval=2,last=false", catalog=catalog):
        found = [denoiser(sample, now) for now in table]
    assert denoiser.calls == 5
    for step, (one, (other,)) in enumerate(found):
        # Step 1 has one value to go by.
        wanted = 0 if step == 1 else step
        assert torch.equal(one, sample * wanted)
        assert torch.equal(other, sample[:, :1] - wanted)


def test_what_the_pipeline_does_to_an_output_does_not_reach_the_history() -> None:
    pipe = tiny.small()
    _, expected = drawn(pipe, "cache:where=denoiser,when=every(2),what=reuse")
    wanted, _ = drawn(pipe, "cache:where=denoiser,when=every(2),what=reuse")
    step = pipe.scheduler.step

    def spoiling(output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        done = step(output, *args, **kwargs)
        output.zero_()
        return done

    pipe.scheduler.step = spoiling
    found, _ = drawn(pipe, "cache:where=denoiser,when=every(2),what=reuse", guidance=1.0)
    pipe.scheduler.step = step
    assert torch.equal(found, drawn(pipe, "cache:where=denoiser,when=every(2),what=reuse", guidance=1.0)[0])
    assert expected.left_out == STEPS // 2
    assert torch.isfinite(wanted).all()


# -- residuals and x0 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_a_reused_x0_is_what_the_scheduler_calls_x0(scheduler: Any, prediction: str) -> None:
    """With the first step's x0 in every later one, the scheduler finds the same x0 in all of them."""
    seen: list[torch.Tensor] = []

    class Noting(scheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            done = super().step(*args, **{**kwargs, "return_dict": True})
            seen.append(done.pred_original_sample)
            return (done.prev_sample,)

    pipe = tiny.small()
    pipe.scheduler = Noting.from_config(pipe.scheduler.config, prediction_type=prediction, clip_sample=False)
    _, report = drawn(pipe, "cache:where=denoiser,when=mask(0),what=reuse(of=x0)", guidance=1.0)
    assert report.left_out == STEPS - 1
    for found in seen:
        torch.testing.assert_close(found, seen[0], rtol=1e-3, atol=1e-3)


def test_a_reused_x0_of_a_flow() -> None:
    pipe = tiny.flux()
    seen: list[torch.Tensor] = []
    step, table = pipe.scheduler.step, pipe.scheduler

    def noting(output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        done = step(output, timestep, sample, **kwargs)
        seen.append(sample - table.sigmas[table.step_index - 1] * output)
        return done

    pipe.scheduler.step = noting
    drawn(pipe, "cache:where=denoiser,when=mask(0),what=reuse(of=x0)")
    assert len(seen) == STEPS
    for found in seen:
        torch.testing.assert_close(found, seen[0], rtol=1e-3, atol=1e-3)


def test_a_residual_of_the_denoiser_is_added_to_the_sample() -> None:
    pipe = tiny.small()
    by_output, _ = drawn(pipe, "forecast:interval=2")
    by_residual, _ = drawn(pipe, "forecast:interval=2,of=residual")
    assert not torch.equal(by_output, by_residual)
    assert torch.isfinite(by_residual).all()


@pytest.mark.parametrize("make", [tiny.pixart, tiny.svd])
@pytest.mark.parametrize("of", ["x0", "residual"])
def test_channels_that_only_one_has_are_forecast_as_they_are(make: Any, of: str) -> None:
    found, report = drawn(make(), f"forecast:interval=2,of={of}")
    assert torch.isfinite(found).all()
    assert report.left_out


def test_x0_needs_a_scheduler() -> None:
    unet = tiny.small().unet
    text, noise = tiny.text(1), torch.randn(1, 4, 16, 16)
    with (
        cachekit.apply(unet, "forecast:of=x0"),
        pytest.raises(PolicyError, match=r"forecast.*needs kind and sigma, which a loop"),
    ):
        unet(noise, 500, text)


def test_x0_of_a_video_by_hand() -> None:
    """Frames come before channels there, and the sample has an image's channels beside those of the output."""
    pipe, twin = tiny.svd(), tiny.svd()
    forward, kept = twin.unet.forward, []

    def by_hand(sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        step = twin.scheduler.step_index or 0
        noisy, ratio = sample[:, :, :4], twin.scheduler.sigmas[step]
        alpha, sigma = 1 / (1 + ratio**2).sqrt(), ratio / (1 + ratio**2).sqrt()
        if step in (0, 2, 4, 5):
            (output,) = forward(sample, timestep, *args, **kwargs)
            kept.append((step, alpha * noisy - sigma * output))
            return (output,)
        (a, newest), (b, older) = kept[-1], kept[max(len(kept) - 2, 0)]
        clean = newest + (step - a) / (a - b) * (newest - older) if a != b else newest
        return ((alpha * noisy - clean) / sigma,)

    twin.unet.forward = by_hand
    wanted = tiny.latents(twin, steps=6)
    found, report = drawn(pipe, "forecast:interval=2,of=x0", steps=6)
    assert (report.left_out, len(kept)) == (2, 4)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, drawn(pipe, "forecast:interval=2", steps=6)[0], rtol=1e-2)


class Halving(StandIn):
    """Notes how many entries it reads, and halves the output of the last step."""

    name: ClassVar[str] = "halving"
    length: ClassVar[int | None] = 2
    amends: ClassVar[bool] = True
    lasts: int = -1

    def predict(self, history: History, at: Moment, given: Streams = ()) -> Streams:
        at.shared.setdefault("trace", []).append((at.step, "predict", len(history)))
        return history[0].tensors

    def amend(self, output: Streams, history: History, at: Moment, given: Streams = ()) -> Streams:
        at.shared.setdefault("trace", []).append((at.step, "amend", len(history)))
        return tuple(tensor / 2 for tensor in output) if at.step == self.lasts else output


class Halved(Policy):
    """Forecasts whose computed outputs are corrected."""

    name: ClassVar[str] = "halved"
    lasts: int = -1

    def choices(self) -> dict[str, Choice]:
        return {"denoiser": Choice(WholeDenoiser(), Every(n=3, last=True), Halving(lasts=self.lasts))}


def test_the_last_steps_are_corrected_by_what_was_kept_before() -> None:
    """No later step reads it, but the correction of the last ones does."""
    pipe = tiny.small()
    as_computed, report = drawn(pipe, Halved())
    full = [(0, "amend", 0), (3, "amend", 1), (6, "amend", 2), (7, "amend", 2)]
    between = [(1, "predict", 1), (2, "predict", 1), (4, "predict", 2), (5, "predict", 2)]
    assert report.traces["halved"] == sorted([*full, *between])
    assert [row.actions[0] for row in report.record.rows[-2:]] == [Action.STORE] * 2
    assert not torch.equal(drawn(pipe, Halved(lasts=7))[0], as_computed)
    assert not torch.equal(drawn(pipe, Halved(lasts=6))[0], as_computed)


@pytest.mark.parametrize(
    ("name", "given"),
    [("QwenImage21Pipeline", {}), ("Flux2KleinKVPipeline", {"image": Image.new("RGB", (64, 64))})],
)
def test_calls_that_leave_keys_and_values_for_later_ones_are_not_left_out(name: str, given: dict[str, Any]) -> None:
    if not hasattr(diffusers, name):
        pytest.skip(f"this release of diffusers has no {name}")
    pipe = build(name)

    def run() -> np.ndarray:
        torch.manual_seed(0)
        return np.asarray(pipe(**{**arguments(pipe, name), **given})[0])

    uncached = run()
    with cachekit.apply(pipe, "forecast"), pytest.raises(SiteError) as caught:
        run()
    assert str(caught.value) == (
        f"forecast: would leave out calls of {type(pipe.transformer).__name__}, but each call writes keys and values"
        " that later ones of its branch read; use a policy for attention or blocks"
    )
    assert np.array_equal(run(), uncached)
    with cachekit.apply(pipe, "cache:where=feed_forward") as attachment:
        run()
        assert sum(count.reused for count in attachment.report().counts)


# -- together --------------------------------------------------------------------------------------------------


def test_a_periodic_store_inside_waits_for_the_next_full_call() -> None:
    """Otherwise deepcache would drag the forecast down."""
    pipe = tiny.small()
    with cachekit.apply(pipe, ["forecast:interval=3,last=false", "deepcache:interval=2"]) as attachment:
        marks = {spec: marks for spec, _, _, marks in attachment.plan(9).columns()}
        tiny.latents(pipe, steps=9)
        report = attachment.report()
    assert marks["forecast:interval=3,last=false"] == "SrrSrrSrr"
    # Its own steps are 0, 2, 4, 6, 8: 2 waits for 3, 4 for 6.
    assert [step for step, mark in enumerate(marks["deepcache:interval=2"]) if mark == "S"] == [0, 3, 6]
    assert report.left_out == 6
    assert sum(count.missed for count in report.counts) == 0


def test_a_gate_inside_insists_on_a_full_call() -> None:
    pipe = tiny.small()
    with cachekit.apply(pipe, ["forecast:interval=4,last=false", "tgate:m=3"]) as attachment:
        marks = {(spec, kind): marks for spec, _, kind, marks in attachment.plan(9).columns()}
        found = tiny.latents(pipe, steps=9)
        report = attachment.report()
    assert marks["forecast:interval=4,last=false", "denoiser"] == "SrSrrrSrr"
    assert marks["tgate:m=3", "cross_attention"] == "..Srrrrrr"
    assert torch.isfinite(found).all()
    assert sum(count.missed for count in report.counts) == 0


def test_guidance_and_calls_come_and_go() -> None:
    """Every second step guided, every third computed, in one batch and in calls apart; nothing is missed."""
    for pipe in (tiny.small(), tiny.wan()):
        _, report = drawn(pipe, "forecast:interval=3", "adaptive_guidance:every=2", steps=12)
        assert sum(count.missed for count in report.counts) == 0
        assert {count.kind: count.reused > 0 for count in report.counts} == {"guidance": True, "denoiser": True}


@pytest.mark.parametrize("make", [tiny.small, tiny.wan])
def test_deepcache_or_delta_dit_fires_although_branches_come_and_go(make: Any) -> None:
    spec = "deepcache:interval=3" if make is tiny.small else "delta_dit:interval=3"
    _, report = drawn(make(), spec, "adaptive_guidance:every=2", steps=12)
    count = next(count for count in report.counts if count.kind == "block")
    assert count.reused >= 6
    assert count.missed == 0


# -- faults, threads, limits -----------------------------------------------------------------------------------


def test_guidance_that_the_pipeline_cuts_short() -> None:
    pipe = tiny.small()
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=3)
    found, report = drawn(pipe, FORECAST, callback_on_step_end=cut)
    assert torch.isfinite(found).all()
    assert [len(call.row.branches) for call in report.record.calls] == [2, 2, 2, 2, 1, 1, 1, 1]


def test_an_interrupted_run_leaves_nothing_for_the_next() -> None:
    pipe = tiny.small()
    expected, _ = drawn(pipe, FORECAST)

    def stop(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            raise KeyboardInterrupt
        return given

    with cachekit.apply(pipe, FORECAST):
        with pytest.raises(KeyboardInterrupt):
            tiny.latents(pipe, steps=STEPS, seed=5, callback_on_step_end=stop)
        assert torch.equal(tiny.latents(pipe, steps=STEPS), expected)


def test_threads_share_nothing() -> None:
    pipe = tiny.flux()
    expected = {seed: drawn(pipe, FORECAST, seed=seed)[0] for seed in range(3)}
    found: dict[int, torch.Tensor] = {}
    pipes = {
        seed: type(pipe)(**{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)})
        for seed in range(3)
    }
    with cachekit.apply(pipe, FORECAST):
        threads = [
            threading.Thread(
                target=lambda seed=seed: found.update({seed: tiny.latents(pipes[seed], steps=STEPS, seed=seed)})
            )
            for seed in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(3))


def test_a_limit_that_the_history_does_not_fit_into() -> None:
    pipe = tiny.small()
    plain = tiny.latents(pipe, steps=STEPS)
    cached, report = drawn(pipe, FORECAST)
    with cachekit.apply(pipe, FORECAST, max_cache_bytes=report.cache_bytes):
        assert torch.equal(tiny.latents(pipe, steps=STEPS), cached)
    with (
        cachekit.apply(pipe, FORECAST, max_cache_bytes=report.cache_bytes - 1),
        pytest.raises(cachekit.BudgetError, match="nothing of 'forecast:interval=3' fits"),
    ):
        tiny.latents(pipe, steps=STEPS)
    assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)


def test_what_a_forecast_keeps_of_sdxl() -> None:
    """Two outputs of both branches at 1024 pixels: at most 0.6 MiB in half precision."""
    found = cachekit.estimate("sdxl", "forecast", num_inference_steps=25)
    assert found.cache_bytes == 2 * 2 * 4 * 128 * 128 * 2 <= 0.6 * 2**20
    assert found.baseline_macs * 13 == found.macs * 25


# -- what is wrong ---------------------------------------------------------------------------------------------


class Wrong(Reuse):
    """Predict what can't be used."""

    name = "wrong"
    how: str

    def predict(self, history: Any, at: Any, given: Any = ()) -> Any:
        (tensor,) = history[0].tensors
        return {
            "bare": tensor,
            "list": [tensor],
            "two": (tensor, tensor),
            "half": (tensor.half(),),
            "one image": (tensor[:1],),
            "number": (3,),
        }[self.how]


class Wronged(Policy):
    name = "wronged"
    how: str

    def choices(self) -> Any:
        return {"denoiser": Choice(WholeDenoiser(), Every(n=2), Wrong(how=self.how))}


@pytest.mark.parametrize("how", ["bare", "list", "two", "half", "one image", "number"])
def test_what_a_stand_in_returns_is_checked(how: str) -> None:
    pipe = tiny.small()
    plain = tiny.latents(pipe, steps=STEPS)
    line = f"^wronged:how={how}: predict of wrong.* for 'denoiser' at step 1 returned "
    with cachekit.apply(pipe, Wronged(how=how)), pytest.raises(PolicyError, match=line) as caught:
        tiny.latents(pipe, steps=STEPS)
    assert len(str(caught.value).splitlines()) == 1
    assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)


class Unweighted(Reuse):
    name = "unweighted"
    length = 2

    def weights(self, times: Any, at: Any) -> Any:
        return [1.0]

    def predict(self, history: Any, at: Any, given: Any = ()) -> Any:
        return StandIn.predict(self, history, at, given)


def test_a_stand_in_gives_a_weight_for_each_entry() -> None:
    pipe = tiny.small()

    class Lacking(Policy):
        name = "lacking"

        def choices(self) -> Any:
            return {"denoiser": Choice(WholeDenoiser(), Every(n=2), Unweighted())}

    with cachekit.apply(pipe, Lacking()), pytest.raises(PolicyError, match=r"at step 3 .*1 weights for 2 kept entries"):
        tiny.latents(pipe, steps=5)


def test_a_part_at_guidance_may_refuse_a_run() -> None:
    class Refusing(Reuse):
        name = "refusing"

        def begin(self, run: Any, shared: Any) -> None:
            raise SpecError(f"not for {type(run.denoiser).__name__}")

    class Refused(Policy):
        name = "refused"

        def choices(self) -> Any:
            return {"guidance": Choice(Guidance(), Every(n=2), Refusing())}

    pipe = tiny.small()
    plain = tiny.latents(pipe, steps=STEPS)
    with cachekit.apply(pipe, Refused()), pytest.raises(SpecError, match=r"^not for UNet2DConditionModel$"):
        tiny.latents(pipe, steps=STEPS)
    assert torch.equal(tiny.latents(pipe, steps=STEPS), plain)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cache:where=denoiser,what=drop", "drop keeps nothing, which makes sense at guidance alone"),
        ("cache:where=self_attention,what=reuse(of=x0)", "of=x0 makes sense at the denoiser alone"),
        ("cache:where=region,what=linear(of=residual)", "has no residual"),
        ("cache:where=joint_attention", "looked for joint_attention, but UNet2DConditionModel has"),
    ],
)
def test_parts_that_do_not_fit_together(spec: str, message: str) -> None:
    pipe = tiny.small()
    with tiny.leaves_no_trace(pipe), pytest.raises(SiteError, match=message):
        cachekit.apply(pipe, spec)


def test_an_axis_that_the_scheduler_does_not_have() -> None:
    unet = tiny.small().unet
    with (
        cachekit.apply(unet, "cache:where=denoiser,what=linear(axis=log_snr)"),
        pytest.raises(CachekitError, match="needs log_snr, which a loop without a scheduler does not give"),
    ):
        unet(torch.randn(1, 4, 16, 16), 500, tiny.text(1))


def test_a_schedule_of_timesteps_is_open_without_a_scheduler() -> None:
    pipe = tiny.small()
    spec = "cache:where=cross_attention,when=window(low=200,high=700,when=every(2))"
    with cachekit.apply(pipe.unet, spec) as attachment:
        assert {cell for row in attachment.plan(6).rows for cell in row.actions} == {OPEN, Action.STORE}
    with cachekit.apply(pipe, spec) as attachment:
        planned = [row.actions[0] for row in attachment.plan(6).rows]
        tiny.latents(pipe, steps=6)
        done = [row.actions[0] for row in attachment.report().record.rows]
    assert None not in planned
    assert planned == done
    assert Action.REUSE in planned


def test_a_long_interval_points_to_calibrated() -> None:
    pipe = tiny.small()
    for spec, expected in (("forecast:interval=2", []), ("forecast:interval=3,order=0", [])):
        assert drawn(pipe, spec)[1].warnings == expected
    (line,) = drawn(pipe, "forecast:interval=3")[1].warnings
    assert line.startswith("forecast:interval=3: above an interval of 2")
    assert line.endswith("compare with calibrated:interval=3")


def test_what_is_attached_and_where_policies_can_act() -> None:
    pipe = tiny.small()
    assert cachekit.attachment(pipe) is None
    with cachekit.apply(pipe, FORECAST) as attachment:
        assert cachekit.attachment(pipe) is cachekit.attachment(pipe.unet) is attachment
    assert cachekit.attachment(pipe) is None
    assert cachekit.sites(pipe)["unet"].model == "UNet2DConditionModel"
