"""A gate that the run finds equals the fixed gate at that step to the bit; `mean=false` keeps the branch's own part."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from support import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import cachekit
from cachekit import Action, ConflictError, SpecError
from cachekit.interface.specs import parse
from cachekit.registry.catalog import installed

STEPS = 7
MAKERS = {"sd": tiny.small, "pixart": tiny.pixart, "wan": tiny.wan}
#: Shares at which the gate opens in the middle of the run of these models.
SETTLED = {"sd": 0.9, "pixart": 0.9, "wan": 0.9}

shared = tiny.sharing(MAKERS)


def run(name: str, *specs: str, **changes: Any) -> tuple[torch.Tensor, Any]:
    with cachekit.apply(shared(name), specs) as attachment:
        made = tiny.latents(shared(name), **{"steps": STEPS, **changes})
        return made, attachment.report()


@functools.cache
def found(name: str) -> tuple[torch.Tensor, Any, int]:
    made, report = run(name, f"tgate:m=auto,settled={SETTLED[name]}")
    return made, report, gate_of(report)


def gate_of(report: Any) -> int:
    """The first step whose row reuses cross-attention."""
    return next(row.step for row in report.record.rows if row.actions[0] is Action.REUSE)


@pytest.mark.parametrize("name", MAKERS)
def test_a_found_gate_equals_the_fixed_one(name: str) -> None:
    made, report, gate = found(name)
    fixed, other = run(name, f"tgate:m={gate}")
    assert 1 < gate < STEPS
    assert torch.equal(made, fixed)
    assert report.macs == other.macs


@pytest.mark.parametrize("name", MAKERS)
def test_the_gate_opens_after_the_first_step_below_the_share(name: str) -> None:
    _, report, gate = found(name)
    steps, changes = zip(*report.traces["tgate"])
    assert steps == tuple(range(1, gate))
    below = [change <= SETTLED[name] * max(changes[: place + 1]) for place, change in enumerate(changes)]
    assert below == [False] * (gate - 2) + [True]


def test_changes_are_means_over_sites_of_the_relative_change() -> None:
    pipe, outputs = tiny.small(), {}
    for name, module in tiny.denoiser_of(pipe).named_modules():
        if name.endswith(".attn2"):
            module.register_forward_hook(functools.partial(lambda name, *call: outputs[name].append(call[-1]), name))
            outputs[name] = []
    tiny.latents(pipe, steps=STEPS)
    _, report, _ = found("sd")
    for step, change in report.traces["tgate"]:
        apart = [(kept[step] - kept[step - 1]).norm() / kept[step - 1].norm() for kept in outputs.values()]
        assert change == pytest.approx(float(torch.stack(apart).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("others", "changes"),
    [
        (("deepcache:interval=2",), {}),
        ((), {"batch": 2}),
        ((), {"guidance": 1.0}),
        (("cache:where=denoiser,when=every(2)",), {}),
    ],
)
def test_it_composes_as_the_fixed_gate(others: tuple[str, ...], changes: dict[str, Any]) -> None:
    made, report = run("sd", "tgate:m=auto,settled=0.95", *others, **{"steps": 10, **changes})
    gate = gate_of(report)
    assert 1 < gate < 10
    fixed, _ = run("sd", f"tgate:m={gate}", *others, **{"steps": 10, **changes})
    assert torch.equal(made, fixed)


def test_the_second_version_follows_a_found_gate() -> None:
    made, report = run("sd", f"tgate:m=auto,settled={SETTLED['sd']},sp_interval=2")
    gate = gate_of(report)
    fixed, _ = run("sd", f"tgate:m={gate},sp_interval=2")
    assert torch.equal(made, fixed) == (gate % 2 == 1)  # else the fixed gate keeps one more step
    both, other = run("sd", f"tgate:m=auto,settled={SETTLED['sd']},sp_interval=2,fi_interval=3")
    marks = [row.actions[-1] for row in other.record.rows][gate_of(other) :]
    assert marks[0] is Action.STORE
    assert Action.REUSE in marks
    assert not torch.equal(both, made)


class Readings(TorchDispatchMode):
    """Counts the values that are read off tensors, each of which would wait for a device."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count a reading, and go on."""
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_gate_is_found_by_one_value_a_step() -> None:
    *_, gate = found("sd")
    assert sum(site.kind == "cross_attention" for site in cachekit.sites(shared("sd"))["unet"].sites) > 1
    with Readings() as auto:
        run("sd", f"tgate:m=auto,settled={SETTLED['sd']}")
    with Readings() as fixed:
        run("sd", f"tgate:m={gate}")
    assert auto.count - fixed.count == gate - 1


def test_without_convergence_nothing_changes() -> None:
    made, report = run("sd", "tgate:m=auto,settled=0.0001")
    assert torch.equal(made, tiny.latents(shared("sd"), steps=STEPS))
    assert report.warnings == [f"tgate:m=auto,settled=0.0001 never fired in this run of {STEPS} guided steps"]


def test_plans_leave_the_gate_open_and_estimates_count_no_saving() -> None:
    with cachekit.apply(shared("sd"), "cair:n=auto") as attachment:
        plan = attachment.plan(4)
    assert {marks for *_, marks in plan.columns()} == {"????"}
    estimate = cachekit.estimate(shared("sd"), "tgate:m=auto", num_inference_steps=4)
    assert estimate.macs == estimate.baseline_macs


def test_text_that_is_away_for_some_steps_is_refused() -> None:
    with pytest.raises(
        ConflictError, match=r"'null_text:before=2' takes the text away at step 0, where 'tgate:m=auto'"
    ):
        run("sd", "tgate:m=auto", "null_text:before=2")


@pytest.mark.parametrize("keep", ["uncond", "cond"])
def test_the_remaining_branch_keeps_its_own_attention(keep: str) -> None:
    made, _ = run("sd", f"tgate:m=3,keep={keep},mean=false")
    parts = ("cache:where=cross_attention,when=after(3)", f"cache:where=guidance(keep={keep}),when=after(3),what=drop")
    assert torch.equal(made, run("sd", *parts)[0])
    assert not torch.equal(made, run("sd", f"tgate:m=3,keep={keep}")[0])


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("tgate:m=0", "m=0: Input should be greater than or equal to 1, or 'auto'"),
        ("cair:n=soon", "n=soon: Input should be a valid integer, unable to parse string as an integer, or 'auto'"),
        ("tgate:settled=2", "settled=2: Input should be less than or equal to 1"),
    ],
)
def test_wrong_values_name_what_is_allowed(spec: str, reason: str) -> None:
    with pytest.raises(SpecError) as error:
        parse(spec, installed())
    assert str(error.value) == f"spec {spec!r}: {reason}"
