"""Limits on bytes: what saves least is dropped before the run, or the run is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from support import tiny
from support.commands import printed
from support.policies import FirstBlock

import cachekit
from cachekit import (
    Choice,
    Entry,
    Every,
    Layout,
    Policy,
    Reuse,
    SiteMap,
    Target,
    Time,
    Where,
    WholeDenoiser,
)  # fmt: skip
from cachekit.costs import fitting
from cachekit.errors import BudgetError
from cachekit.interface.specs import parse
from cachekit.registry.catalog import installed
from cachekit.runs import limit, store
from cachekit.runs.store import Store
from cachekit.tensors import tree_map
from cachekit.upstream.pipelines import denoiser_of

STEPS = 5
MAKERS: dict[str, Callable[[], Any]] = {
    "sd": functools.partial(tiny.small, layers_per_block=1, sample_size=8),
    "pixart": tiny.pixart,
}
SPECS = {"sd": ("tgate:m=3,sp_interval=2", "deepcache:interval=2"), "pixart": ("tgate:m=3",)}

shared = tiny.sharing(MAKERS)
plain = tiny.uncached(shared, steps=STEPS)


def cached(name: str, specs: Any, **limits: Any) -> tuple[torch.Tensor, Any]:
    with cachekit.apply(shared(name), specs, **limits) as attachment:
        return tiny.latents(shared(name), steps=STEPS), attachment.report()


@functools.cache
def unlimited(name: str) -> tuple[torch.Tensor, Any]:
    return cached(name, SPECS[name])


class Without(Where):
    """Another place, less some of its targets."""

    where: Where
    dropped: tuple[str, ...]

    def find(self, sites: SiteMap) -> list[Target]:
        return [target for target in self.where.find(sites) if target.name not in self.dropped]

    def stays(self, layout: Layout) -> str:
        return self.where.stays(layout)


def without(name: str, dropped: list[tuple[str, str]]) -> list[Any]:
    """Make policies like those of SPECS that never select the dropped places."""

    def choices(policy: Policy) -> dict[str, Choice]:
        names = tuple(target for spec, target in dropped if spec == str(policy))
        chosen = type(policy).__base__.choices(policy)
        return {key: it.with_parts(where=Without(where=it.where, dropped=names)) for key, it in chosen.items()}

    (sites,) = cachekit.sites(shared(name)).values()

    def is_left(policy: Policy) -> bool:
        found = [target for choice in policy.choices().values() for target in choice.where.find(sites)]
        return any((str(policy), target.name) not in dropped for target in found)

    policies = [policy for policy in (parse(spec, installed()) for spec in SPECS[name]) if is_left(policy)]
    return [type("Some", (type(it),), {"choices": choices, "__module__": __name__})(**dict(it)) for it in policies]


@pytest.mark.parametrize(("name", "share"), [("sd", 0.2), ("pixart", 0.7), ("pixart", 0.34)])
def test_what_does_not_fit_is_computed(name: str, share: float) -> None:
    whole, report = unlimited(name)
    limit = int(share * report.cache_bytes)
    found, limited = cached(name, SPECS[name], max_cache_bytes=limit)
    assert 0 < limited.cache_bytes <= limit < limited.needed_bytes == report.cache_bytes
    assert limited.dropped
    assert "computed to save bytes: " in str(limited)
    assert sum(count.missed for count in limited.counts) == 0
    assert report.macs < limited.macs < report.baseline_macs
    assert not torch.equal(found, plain(name))
    # As if the policies had never selected those places.
    assert torch.equal(found, cached(name, without(name, limited.dropped))[0])
    assert not torch.equal(found, whole)
    assert torch.equal(tiny.latents(shared(name), steps=STEPS), plain(name))
    assert torch.equal(cached(name, SPECS[name], max_cache_bytes=limit)[0], found)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("more", [0, 10**12])
def test_what_fits_is_not_touched(name: str, more: int) -> None:
    whole, report = unlimited(name)
    found, limited = cached(name, SPECS[name], max_cache_bytes=report.cache_bytes + more)
    assert torch.equal(found, whole)
    assert limited.dropped == []
    assert str(limited.counts) == str(report.counts)
    assert (limited.cache_bytes, limited.needed_bytes) == (report.cache_bytes,) * 2


def test_what_saves_least_for_its_bytes_goes_first() -> None:
    """DeepCache's one tensor saves more than any attention, and costs as much as one."""
    _, report = unlimited("sd")
    _, limited = cached("sd", SPECS["sd"], max_cache_bytes=report.cache_bytes // 4)
    assert limited.dropped
    assert not any(spec.startswith("deepcache") for spec, _ in limited.dropped)


def test_a_window_of_timesteps_is_planned_for_with_those_of_the_run() -> None:
    """Without them every step could be kept, and a run that keeps nothing would be refused."""
    window = "cache:where=cross_attention,when=window(low={},high={},when=every(2))"
    spec = window.format(200, 700)
    found, report = cached("sd", spec)
    assert sum(count.reused for count in report.counts) > 0
    same, limited = cached("sd", spec, max_cache_bytes=report.cache_bytes)
    assert torch.equal(same, found)
    assert (limited.dropped, limited.needed_bytes, limited.cache_bytes) == ([], *[report.cache_bytes] * 2)
    _, half = cached("sd", spec, max_cache_bytes=report.cache_bytes // 2)
    assert half.dropped
    assert half.cache_bytes <= report.cache_bytes // 2 < half.needed_bytes == report.cache_bytes
    none, outside = cached("sd", window.format(0, 0.5), max_cache_bytes=1)
    assert torch.equal(none, plain("sd"))
    assert (outside.needed_bytes, outside.dropped) == (0, [])


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_is_refused_before_it_begins_if_nothing_fits(name: str) -> None:
    pipe, calls = shared(name), []
    _, report = unlimited(name)

    def count(_: Any, __: Any, output: torch.Tensor) -> None:
        calls.extend([] if output.is_meta else [1])

    handle = next(denoiser_of(pipe).children()).register_forward_hook(count)
    with cachekit.apply(pipe, SPECS[name], max_cache_bytes=100) as attachment:
        with pytest.raises(BudgetError) as caught:
            tiny.latents(pipe, steps=STEPS)
        assert attachment.driver.state.run is None
    handle.remove()
    line = str(caught.value)
    assert calls == []
    assert line.startswith("max_cache_bytes=100: nothing of 'tgate:m=3")
    assert line.endswith(f" bytes, all of them {report.cache_bytes:,}; raise it, or leave it out")
    assert len(line.splitlines()) == 1
    smallest = int(line.partition("the smallest place needs ")[2].partition(" ")[0].replace(",", ""))
    assert cached(name, SPECS[name], max_cache_bytes=smallest)[1].cache_bytes == smallest
    with pytest.raises(BudgetError):
        cached(name, SPECS[name], max_cache_bytes=smallest - 1)
    assert torch.equal(tiny.latents(pipe, steps=STEPS), plain(name))


OPEN = {
    "observed": ("tgate:m=5,sp_interval=2", "adaptive_guidance:threshold=-1,linear=true"),
    "probed": (FirstBlock(limit=0.7),),
    "history": ("cache:where=span(first=1,stop=3),when=every(3),what=linear(of=residual)", "adaptive_guidance:m=3"),
}


@pytest.mark.parametrize("case", OPEN)
def test_where_the_run_decides_the_worst_is_planned_for(case: str) -> None:
    whole, report = cached("pixart", OPEN[case])
    found, limited = cached("pixart", OPEN[case], max_cache_bytes=10**9)
    assert torch.equal(found, whole)
    planned = limited.needed_bytes
    assert planned >= limited.cache_bytes == report.cache_bytes
    if case == "observed":
        _, limited = cached("pixart", OPEN[case], max_cache_bytes=planned // 2)
        assert limited.dropped
        assert limited.cache_bytes <= planned // 2
    else:
        with pytest.raises(BudgetError, match=f"all of them {planned:,}"):
            cached("pixart", OPEN[case], max_cache_bytes=planned - 1)


def test_it_is_planned_once_for_each_kind_of_run(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []

    class Counted(fitting.Rehearsal):
        def __init__(self, setup: Any, start: Any) -> None:
            planned.append((start.steps, start.inputs.batch))
            super().__init__(setup, start)

    monkeypatch.setattr(fitting, "Rehearsal", Counted)
    with cachekit.apply(shared("pixart"), "tgate:m=2", max_cache_bytes=10**6):
        for call in ({"steps": 3}, {"steps": 3}, {"steps": 4}, {"steps": 3, "batch": 2}, {"steps": 3, "seed": 1}):
            tiny.latents(shared("pixart"), **call)
    assert planned == [(3, 2), (4, 2), (3, 4)]


@torch.no_grad()
def test_unforeseen_calls_stay_within_the_limit() -> None:
    """A loop that calls the denoiser three times in each step would keep three times as much."""
    unet, table = MAKERS["sd"]().unet, torch.arange(900, 0, -100)
    text = torch.cat([tiny.text(1, seed=4), tiny.text(1)])
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)

    def outputs() -> list[torch.Tensor]:
        return [unet(sample * number, t, text).sample for t in table[:4] for number in (1, 2, 3)]

    without = outputs()
    with cachekit.apply(unet, "deepcache:interval=2") as attachment:
        whole, needed = outputs(), attachment.report().cache_bytes
    with cachekit.apply(unet, "deepcache:interval=2", max_cache_bytes=needed // 3) as attachment:
        found, report = outputs(), attachment.report()
    assert report.cache_bytes == needed // 3
    assert report.warnings == [
        "deepcache: 8 outputs at steps 0 to 3 were beyond max_cache_bytes and were not kept: computed instead"
    ]
    firsts = range(0, len(found), 3)
    assert all(torch.equal(found[i], whole[i] if i in firsts else without[i]) for i in range(len(found)))


class Rounded(Reuse):
    """Look at values of what is computed, which aren't known before the run."""

    name: ClassVar[str] = "rounded"
    amends: ClassVar[bool] = True

    def amend(self, output: Any, *rest: Any) -> Any:
        return output if output[0].sum().item() > 0 else tuple(tensor.round() for tensor in output)


class ByValue(Policy):
    name: ClassVar[str] = "by_value"

    def choices(self) -> dict[str, Choice]:
        return {"denoiser": Choice(WholeDenoiser(), Every(n=2), Rounded())}


def test_what_depends_on_values_cannot_be_planned() -> None:
    pipe = shared("pixart")
    with (
        cachekit.apply(pipe, ByValue(), max_cache_bytes=10**9),
        pytest.raises(BudgetError, match=r"^max_cache_bytes cannot be planned for: .*; leave it out$"),
    ):
        tiny.latents(pipe, steps=STEPS)


@pytest.mark.parametrize("limit", [0, -1, 1.5, "500MiB", True])
def test_a_limit_is_a_number_of_bytes(limit: Any) -> None:
    pipe = shared("pixart")
    with tiny.leaves_no_trace(pipe), pytest.raises(BudgetError, match="give a whole number of at least 1"):
        cachekit.apply(pipe, "tgate", max_cache_bytes=limit)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", 3.5])
def test_a_device_is_one_of_this_machine(device: Any) -> None:
    pipe = shared("pixart")
    with tiny.leaves_no_trace(pipe), pytest.raises(BudgetError, match=r"cache_device=.*give a device") as caught:
        cachekit.apply(pipe, "tgate", cache_device=device)
    assert len(str(caught.value).splitlines()) == 1


# -- kept elsewhere --------------------------------------------------------------------------------------------


class Elsewhere:
    """Stand-in for a second device: tensors moved to "meta" are remembered, and come back from there."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.moves: list[str] = []

    def move(self, kept: Any, devices: list[torch.device]) -> Any:
        onto = iter(devices)
        return tree_map(lambda tensor: self.one(tensor, next(onto)), kept)

    def one(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        self.moves.append(f"{tensor.device}->{device}")
        if device.type != "meta":
            return self.held[id(tensor)][1]
        away = tensor.to(device)
        self.held[id(away)] = (away, tensor.clone())
        return away


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_kept_elsewhere_comes_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, report = unlimited(name)
    elsewhere, seen = Elsewhere(), set()
    monkeypatch.setattr(store, "_moved", elsewhere.move)

    class Watched(Store):
        def push(self, *given: Any) -> bool:
            kept = super().push(*given)
            seen.update(it.device.type for past in self._histories.values() for entry in past for it in entry.tensors)
            return kept

    monkeypatch.setattr(limit, "Store", Watched)
    found, away = cached(name, SPECS[name], cache_device="meta")
    assert torch.equal(found, whole)
    assert seen == {"meta"}
    stored, reused = (sum(getattr(count, what) for count in report.counts) for what in ("stored", "reused"))
    guidance = sum(count.reused for count in report.counts if count.kind == "guidance")
    assert elsewhere.moves.count("cpu->meta") == stored
    assert elsewhere.moves.count("meta->cpu") == reused - guidance
    assert away.cache_bytes == report.cache_bytes


def test_on_the_same_device_nothing_moves() -> None:
    found, _ = cached("pixart", SPECS["pixart"], cache_device="cpu")
    assert torch.equal(found, unlimited("pixart")[0])
    here, kept = Store(device=torch.device("cpu")), torch.ones(3)
    here.push((0, 0), ("cond",), Entry((kept,), Time(0)), 1)
    assert here.read((0, 0), ("cond",))[0][1][0].tensors[0] is kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize(
    "spec", ["tgate:m=3,sp_interval=2", "deepcache:interval=2", "adaptive_guidance:m=2,linear=true"]
)
def test_tensors_of_an_accelerator_can_be_kept_in_main_memory(spec: str) -> None:
    pipe = MAKERS["sd"]().to("cuda")
    with cachekit.apply(pipe, spec):
        whole = tiny.latents(pipe, steps=STEPS)
    with cachekit.apply(pipe, spec, cache_device="cpu"):
        assert torch.equal(tiny.latents(pipe, steps=STEPS), whole)


# -- the command line ------------------------------------------------------------------------------------------


def test_generate_keeps_to_its_limit(tmp_path: Any) -> None:
    call = ["generate", "demo", "a red circle", "--spec", "tgate:m=1", "--steps", 2, "--output", tmp_path / "a.png"]
    shown = printed(*call, "--max-cache-bytes", 40_000, "--cache-device", "cpu")
    assert "computed to save bytes: tgate:m=1 cross_attention x " in shown
