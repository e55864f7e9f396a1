"""FasterCache equals a replay by hand, and diffusers' own where that follows the paper too."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig
from diffusers.hooks import apply_faster_cache
from support import block_replays, tiny
from support.comparisons import ROUNDING, compared

import cachekit
from cachekit import Entry, Moment, PolicyError, Time
from cachekit.registry.catalog import installed

STEPS = 12
MAKERS = {"flux": tiny.flux, "pixart": tiny.pixart, "wan": tiny.wan, "sd3": tiny.sd3}
#: Rounding: transforms of a difference and of what it is between.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

shared = tiny.sharing(MAKERS)
plain = tiny.uncached(shared, steps=STEPS)
#: One branch, whose calls diffusers takes for those of a model with distilled guidance.
UNGUIDED = {"guidance": 1.0}
plain_unguided = tiny.uncached(shared, steps=STEPS, **UNGUIDED)


def cached(name: str, spec: str, **run: Any) -> tuple[torch.Tensor, Any]:
    with cachekit.apply(shared(name), spec) as attachment:
        return tiny.latents(shared(name), steps=STEPS, **run), attachment.report()


def timestep_of(pipe: Any) -> Callable[[], float]:
    calls, now = itertools.count(), {"step": -1}
    tiny.denoiser_of(pipe).register_forward_pre_hook(lambda *_: now.update(step=next(calls)))
    return lambda: float(pipe.scheduler.timesteps[now["step"]])


def published(name: str, run: Mapping[str, Any] = MappingProxyType({}), **changes: Any) -> torch.Tensor:
    """Run with diffusers' own on a pipeline of its own."""
    pipe = MAKERS[name]()
    given = {"tensor_format": "BCHW", "current_timestep_callback": timestep_of(pipe)}
    apply_faster_cache(pipe.transformer, FasterCacheConfig(**{**given, **changes}))
    return tiny.latents(pipe, steps=STEPS, **run)


# -- diffusers' own --------------------------------------------------------------------------------------------


@compared("fastercache", "diffusers: attention", "name", ROUNDING)
@pytest.mark.parametrize(
    ("name", "weight"), [("flux", 0.5), ("flux", 0.3), ("pixart", 0.5), ("sd3", 0.3), ("wan", 0.5)]
)
def test_attention_is_that_of_diffusers_until_it_extrapolates_from_what_it_extrapolated(
    name: str, weight: float
) -> None:
    """The window holds one skipped step."""
    plain_unguided(name)
    times = shared(name).scheduler.timesteps.tolist()
    high = times[-2] + 1
    theirs = published(
        name,
        UNGUIDED,
        is_guidance_distilled=True,
        spatial_attention_timestep_skip_range=(-1, high),
        attention_weight_callback=lambda _: weight,
    )
    found, report = cached(name, f"fastercache:weight={weight},high={high},guidance_interval=1000", **UNGUIDED)
    torch.testing.assert_close(found, theirs, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, plain_unguided(name), rtol=1e-6, atol=1e-6)
    assert {count.reused // count.targets for count in report.counts if count.kind != "guidance"} == {1}


def published_guidance(name: str, interval: int, gain: float) -> torch.Tensor:
    """Run with the half of diffusers' own that leaves out the unconditional branch."""
    return published(
        name,
        spatial_attention_timestep_skip_range=(-1, -1),
        unconditional_batch_skip_range=interval,
        unconditional_batch_timestep_skip_range=(-1, 800),
        alpha_low_frequency=gain,
        alpha_high_frequency=gain,
        low_frequency_weight_update_timestep_range=(300, 10000),
        high_frequency_weight_update_timestep_range=(-1, 300.5),
    )


@compared("fastercache", "diffusers: guidance", ["pixart"], ROUNDING)
@pytest.mark.parametrize(("interval", "gain"), [(5, 1.0), (2, 1.3), (3, 1.0)])
def test_guidance_is_that_of_diffusers_up_to_rounding(interval: int, gain: float) -> None:
    """Where gains do not compound: they are 1, or no two steps in a row are skipped."""
    theirs = published_guidance("pixart", interval, gain)
    keys = f"alpha_low={gain - 1},alpha_high={gain - 1},boundary=300,guidance_high=800,guidance_interval={interval}"
    found, report = cached("pixart", f"fastercache:interval=1,{keys}")
    torch.testing.assert_close(found, theirs, **CLOSE)
    assert not torch.allclose(found, plain("pixart"), **CLOSE)
    (count,) = (count for count in report.counts if count.kind == "guidance")
    assert count.reused > 0


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("sd3", RuntimeError, "must match the size of tensor b"),  # the text is pooled too
        ("wan", IndexError, "tuple index out of range"),  # a call has one branch, and no half to leave out
    ],
)
def test_guidance_of_diffusers_fails_on_others(name: str, error: type[Exception], line: str) -> None:
    with pytest.raises(error, match=line):
        published_guidance(name, interval=5, gain=1.0)


# -- a replay by hand ------------------------------------------------------------------------------------------


class ByHand:
    """Both caches at the level of the modules' outputs; every attention runs, and the unconditional half does not."""

    def __init__(self, pipe: Any, weight: float, alphas: tuple[float, float]) -> None:
        self.pipe, self.weight, self.alphas = pipe, weight, alphas
        self.call, self.separate = -1, type(pipe).__name__ == "WanPipeline"
        self.branches: tuple[str, ...] = ()
        denoiser = pipe.transformer
        self.forward, denoiser.forward = denoiser.forward, self.run
        for name, module in denoiser.named_modules():
            if name.endswith("attn1"):
                module.register_forward_hook(functools.partial(self.leave, {}))

    @property
    def step(self) -> int:
        return self.call // (1 + self.separate)

    @property
    def time(self) -> float:
        return float(self.pipe.scheduler.timesteps[self.step])

    @property
    def is_narrowed(self) -> bool:
        return self.step % 5 != 0 and self.time < 641

    def leave(self, kept: dict[str, list[torch.Tensor]], *called: Any) -> torch.Tensor:
        parts = dict(zip(self.branches, called[-1].chunk(len(self.branches))))
        skips = self.time < 681 and self.step % 2 and self.step % 5
        for branch, output in parts.items():
            last = kept.setdefault(branch, [])
            if skips:
                newest, before = last[-1], last[-2] if len(last) > 1 else last[-1]
                parts[branch] = newest * (1 + self.weight) + before * -self.weight if len(last) > 1 else newest
            else:
                last.append(output)
        return torch.cat(list(parts.values()))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.call += 1
        if self.separate:
            return self._one_of_two(args, kwargs)
        self.branches = ("cond",) if self.is_narrowed else ("uncond", "cond")
        if self.is_narrowed:
            c = self.forward(*tiny.cut(args, 1), **tiny.cut(kwargs, 1))[0]
            return (torch.cat([c + self.filtered(), c]),)
        output = self.forward(*args, **kwargs)
        u, c = output[0].chunk(2)
        self.difference = u - c
        return output

    def _one_of_two(self, args: Any, kwargs: Any) -> Any:
        if self.call % 2 == 0:
            self.branches = ("cond",)
            self.output = self.forward(*args, **kwargs)[0]
            return (self.output,)
        if self.is_narrowed:
            return (self.output + self.filtered(),)
        self.branches = ("uncond",)
        u = self.forward(*args, **kwargs)[0]
        self.difference = u - self.output
        return (u,)

    def filtered(self) -> torch.Tensor:
        """Filter the last difference by a mask of shifted frequencies."""
        low, high = (1 + self.alphas[0], 1.0) if self.time > 300 else (1.0, 1 + self.alphas[1])
        *_, height, width = self.difference.shape
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        mask = (x - width // 2) ** 2 + (y - height // 2) ** 2 <= (min(height, width) // 5) ** 2
        shifted = torch.fft.fftshift(torch.fft.fft2(self.difference), dim=(-2, -1))
        scaled = shifted * torch.where(mask, low, high)
        return torch.fft.ifft2(torch.fft.ifftshift(scaled, dim=(-2, -1))).real


@compared("fastercache", "a replay", "name", ROUNDING)
@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_latents_are_those_of_a_replay(name: str) -> None:
    twin = MAKERS[name]()
    ByHand(twin, 0.4, (0.2, 0.5))
    wanted = tiny.latents(twin, steps=STEPS)
    spec = "fastercache:weight=0.4,alpha_low=0.2,alpha_high=0.5"
    found, report = cached(name, spec)
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert not torch.allclose(found, plain(name), **CLOSE)
    assert torch.equal(tiny.latents(shared(name), steps=STEPS), plain(name))
    again, _ = cached(name, spec)
    assert torch.equal(again, found)
    counts = {count.kind: count for count in report.counts}
    times = shared(name).scheduler.timesteps.tolist()
    narrowed = [step for step in range(STEPS) if step % 5 and times[step] < 641]
    assert counts["guidance"].reused == len(narrowed)
    assert counts["guidance"].missed == counts["self_attention"].missed == 0
    skipped = [step for step in range(STEPS) if step % 2 and step % 5 and times[step] < 681]
    calls = sum(1 if step in narrowed or name != "wan" else 2 for step in skipped)
    assert counts["self_attention"].reused == calls * counts["self_attention"].targets > 0
    assert report.macs < report.baseline_macs


# -- the stand-in ----------------------------------------------------------------------------------------------


def difference(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def predicted(kept: torch.Tensor, timestep: float | None = 500.0, **keys: float) -> torch.Tensor:
    at = Moment(3, 10, time=Time(3, timestep))
    stand_in = installed().stand_ins["frequencies"](**keys)
    (made,) = stand_in.predict((Entry((kept,), Time(0)),), at)
    return made


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 4, 9, 7), (1, 3, 4, 6, 10), (1, 4, 3, 3)])
def test_without_gains_it_is_the_difference(shape: tuple[int, ...]) -> None:
    kept = difference(*shape)
    torch.testing.assert_close(predicted(kept, alpha_low=0, alpha_high=0), kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("timestep", "gain"), [(900.0, 1.5), (301.0, 1.5), (300.0, 1.0), (0.0, 1.0)])
def test_a_constant_is_a_low_frequency(timestep: float, gain: float) -> None:
    kept = torch.full((1, 4, 10, 10), 2.0)
    made = predicted(kept, timestep, alpha_low=0.5, alpha_high=0.25)
    torch.testing.assert_close(made, gain * kept)


@pytest.mark.parametrize(("timestep", "gain"), [(900.0, 1.0), (300.0, 1.25)])
def test_a_checkerboard_is_a_high_frequency(timestep: float, gain: float) -> None:
    kept = (torch.arange(10)[:, None] + torch.arange(10)).remainder(2).mul(2.0).sub(1).expand(1, 4, 10, 10)
    made = predicted(kept, timestep, alpha_low=0.5, alpha_high=0.25)
    torch.testing.assert_close(made, gain * kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    assert predicted(difference(1, 4, 8, 8).to(dtype)).dtype is dtype


def test_outputs_without_height_and_width_are_refused() -> None:
    with pytest.raises(
        PolicyError, match=r"frequencies: the output is \(1, 16, 4\), without height and width; use lin"
    ):
        predicted(difference(1, 16, 4))
    with pytest.raises(PolicyError, match=r"frequencies: no timestep at step 3; use linear, or a scheduler"):
        predicted(difference(1, 4, 8, 8), None)


@pytest.mark.parametrize("spec", ["fastercache", "cache:where=guidance,when=every(5),what=frequencies"])
def test_a_guided_run_of_packed_samples_is_refused_before_anything_is_computed(spec: str) -> None:
    pipe, calls = tiny.flux(), []
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: calls.append(1))
    with cachekit.apply(pipe, spec), pytest.raises(PolicyError) as caught:
        tiny.latents(pipe, steps=STEPS, **block_replays.TRUE_GUIDANCE)
    line = "frequencies: the output is (1, 16, 16), without height and width; use linear(of=residual)"
    assert line in str(caught.value)
    assert not calls


def test_guidance_without_the_rest_is_a_spec() -> None:
    spec = "cache:where=guidance,when=window(high=641,fresh=true,when=every(5)),what=frequencies"
    found, _ = cached("sd3", spec)
    both, _ = cached("sd3", "fastercache:interval=1")
    assert torch.equal(found, both)
    assert not torch.equal(found, plain("sd3"))
