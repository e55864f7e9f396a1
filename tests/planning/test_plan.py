"""Composition on toy sites, without torch: precedence, forced full steps, new phases, conflicts."""

from __future__ import annotations

import copy
import itertools
import subprocess
import sys
from typing import ClassVar

import pytest
from support.scripted import TOY, Script, Scripted

from cachekit import (
    After,
    Chebyshev,
    Choice,
    Drop,
    Every,
    Guidance,
    Linear,
    Moment,
    Policy,
    Reuse,
    Schedule,
    Sites,
)
from cachekit.driving.setup import bind
from cachekit.errors import ConflictError, PolicyError, SiteError
from cachekit.interface.adapter import Layout
from cachekit.interface.moment import OPEN, Action
from cachekit.interface.parts import BranchChange
from cachekit.interface.sites import Kind, Region, Site, SiteMap
from cachekit.interface.specs import parse_all
from cachekit.planning.assignments import Assignment, assign
from cachekit.planning.plan import make_plan
from cachekit.registry.catalog import installed

COMPUTE, STORE, REUSE = Action.COMPUTE, Action.STORE, Action.REUSE
BOTH = ("uncond", "cond")


class Refreshed(Scripted):
    name: ClassVar[str] = "refreshed"
    change: ClassVar[BranchChange] = BranchChange.REFRESH


def plan_of(*specs, steps=25, order=BOTH, sites=TOY):
    policies = parse_all(specs, installed())
    return make_plan(assign(bound for p in policies for bound in bind(p, "", sites)), steps, Layout(order))


def columns(plan):
    """Map (policy, target) to the marks of its column."""
    marks = {COMPUTE: ".", STORE: "S", REUSE: "r", OPEN: "?"}
    return {
        (bound.policy.name, bound.target.name): "".join(marks[row.actions[i]] for row in plan.rows)
        for i, bound in enumerate(plan.assignments)
    }


def trace(plan):
    """Write one word per step: full or skipped, number of branches, cross-attention kept or reused."""
    kinds = [bound.target.kind for bound in plan.assignments]
    words = []
    for row in plan.rows:
        region = row.actions[kinds.index(Kind.BLOCK)]
        cross = {row.actions[i] for i, kind in enumerate(kinds) if kind is Kind.CROSS_ATTENTION}
        (cross,) = cross
        full = region is not REUSE
        mark = {STORE: "K", REUSE: "R", COMPUTE: ""}[cross] if full else ""
        words.append(("F" if full else "s") + str(len(row.branches)) + mark)
    return " ".join(words)


# -- TGATE and DeepCache ---------------------------------------------------------------------------------------


def test_the_known_trace_of_tgate_and_deepcache():
    plan = plan_of("tgate:m=13", "deepcache:interval=3", steps=25)
    guided = " ".join(["F2 s2 s2"] * 4 + ["F2K"])
    gated = " ".join(["F1R s1 s1"] * 4)
    assert trace(plan) == f"{guided} {gated}"
    full = [row.step for row in plan.rows if row.actions[-1] is not REUSE]
    assert (len([s for s in full if s < 13]), len([s for s in full if s >= 13])) == (5, 4)


@pytest.mark.parametrize(
    ("m", "interval", "steps"), list(itertools.product([1, 2, 5, 6, 9, 30], [1, 2, 3, 7], [1, 6, 20]))
)
def test_the_gate_step_is_always_full_and_a_new_phase_follows(m, interval, steps):
    plan = plan_of(f"tgate:m={m}", f"deepcache:interval={interval}", steps=steps)
    skipped = [row.actions[-1] is REUSE for row in plan.rows]
    for step in range(steps):
        if step < m - 1:
            assert skipped[step] is (step % interval != 0)
        elif step >= m:
            assert skipped[step] is ((step - m) % interval != 0)
        elif steps > m:  # without a step after the gate nothing is kept, and nothing is forced
            assert not skipped[step]


def test_alone_each_policy_follows_its_paper():
    tgate = columns(plan_of("tgate:m=3", steps=6))
    assert tgate["tgate", "guidance"] == "...rrr"
    assert tgate["tgate", "mid.cross"] == "..Srrr"
    assert ("tgate", "mid.self") not in tgate


def test_second_version_of_tgate_reuses_self_attention():
    plan = plan_of("tgate:m=10,sp_interval=5,fi_interval=2,warm_up=2", steps=16)
    assert columns(plan)["tgate", "mid.self"] == "..SrrSrrr.SrSrSr"


def test_without_guidance_nothing_is_narrowed():
    plan = plan_of("tgate:m=3", "adaptive_guidance:m=2", steps=6, order=("cond",))
    assert {row.branches for row in plan.rows} == {("cond",)}
    assert columns(plan)["tgate", "guidance"] == "......"
    assert columns(plan)["tgate", "mid.cross"] == "..Srrr"


def test_the_published_default_interval():
    assert columns(plan_of("deepcache:interval=3", steps=9))["deepcache", "region 0"] == "SrrSrrSrr"
    assert columns(plan_of("deepcache:interval=3,start=2,end=7", steps=9))["deepcache", "region 0"] == "..SrrSr.."
    assert columns(plan_of("deepcache:interval=1", steps=4))["deepcache", "region 0"] == "...."


def test_quadratic_schedule_is_dense_around_its_centre():
    column = columns(plan_of("deepcache:interval=5,schedule=quadratic,center=15", steps=50))["deepcache", "region 0"]
    full = [step for step, mark in enumerate(column) if mark != "r"]
    gaps = [after - before for before, after in itertools.pairwise(full)]
    assert full[0] == 0
    assert len(full) <= 11
    assert gaps[-1] > min(gaps)
    assert full[gaps.index(min(gaps))] in range(10, 21)


# -- rules of composition --------------------------------------------------------------------------------------


def test_a_store_that_insists_forces_a_full_step_and_a_new_phase():
    inner = Scripted(script="....Srrr", insists=True)
    plan = plan_of(inner, "deepcache:interval=3", steps=10)
    assert columns(plan)["deepcache", "region 0"] == "SrrSSrrSrr"
    assert columns(plan)["scripted", "mid.cross"] == "....Srrrrr"


def test_any_other_store_inside_a_skipped_block_is_postponed():
    """A periodic schedule once forced full steps like a gate, and cost most of what the block's policy saves."""
    inner = Scripted(script="....Srrr")
    plan = plan_of(inner, "deepcache:interval=3", steps=9)
    assert columns(plan)["deepcache", "region 0"] == "SrrSrrSrr"
    assert columns(plan)["scripted", "mid.cross"] == ".....rSrr"


def test_a_postponed_store_takes_the_place_of_a_step_that_only_computes():
    inner = Scripted(script=".S...rrr")
    plan = plan_of(inner, "deepcache:interval=3", steps=9)
    assert columns(plan)["scripted", "mid.cross"] == "...S.rrrr"


def test_a_postponed_store_that_is_no_longer_read_is_left_out():
    inner = Scripted(script=".Sr.....")
    plan = plan_of(inner, "deepcache:interval=3", steps=9)
    assert columns(plan)["scripted", "mid.cross"] == "..r......"


def test_a_store_outside_the_region_forces_nothing():
    plan = plan_of(Scripted(script="....Srrr", at="down.0.cross"), "deepcache:interval=3,branch=1", steps=9)
    assert columns(plan)["deepcache", "region 1"] == "SrrSrrSrr"


def test_a_store_inside_a_reused_block_forces_it_to_run():
    """A block that is a site of its own covers what lies inside it, as a region does."""
    block = Scripted(script="Srrrrrrr", at="mid")
    plan = plan_of("tgate:m=4", block, steps=7)
    assert columns(plan)["scripted", "mid"][3] != "r"


def test_assignments_are_shared_by_copies():
    policy = Scripted(script="S", at="guidance")
    (bound,) = assign(bind(policy, "", TOY))
    assert copy.deepcopy([bound])[0] is bound


def test_two_blocks_that_lie_within_each_other_conflict():
    with pytest.raises(ConflictError, match="apply one of them"):
        plan_of(Scripted(script="Srr", at="down.1"), "deepcache:branch=1")


def test_idle_stores_are_computes():
    assert columns(plan_of(Scripted(script="SSSrSS.SrrS"), steps=11))["scripted", "mid.cross"] == "..Sr...Srr."


@pytest.mark.parametrize(
    ("what", "script", "steps"),
    [
        (Reuse(), "SrrS.rr..", [3, 7]),  # before it is kept anew, and after it was last read
        (Reuse(), "Sr..r.Sr", [5]),
        (Linear(), "SSrrS..", [4]),  # histories are kept by the engine: a STORE reads none of the older ones
        (Linear(), "SSrSr..", [5]),  # the line at step 4 reads what step 1 kept
    ],
)
def test_what_is_no_longer_read_is_listed_as_unread_for_each_branch(what, script, steps):
    plan = plan_of(Scripted(script=script, stand_in=what), steps=len(script))
    assert [step for step, unread in enumerate(plan.unread) if unread] == steps
    assert all(unread in (frozenset(), {(0, "uncond"), (0, "cond")}) for unread in plan.unread)


def test_a_stand_in_keeps_the_stores_that_fill_its_history():
    assert columns(plan_of(Scripted(script="SSSr", stand_in=Linear()), steps=4))["scripted", "mid.cross"] == ".SSr"
    everything = Scripted(script="SSSr", stand_in=Chebyshev())
    assert columns(plan_of(everything, steps=4))["scripted", "mid.cross"] == "SSSr"


def test_a_change_of_branches_restarts_the_policies_that_refresh():
    narrowing = "adaptive_guidance:m=4"
    kept, fresh = Scripted(script="Srrrrrrr"), Refreshed(script="Srrrrrrr", at="mid.self")
    found = columns(plan_of(narrowing, kept, fresh, steps=8))
    assert found["scripted", "mid.cross"] == "Srrrrrrr"
    assert found["refreshed", "mid.self"] == "SrrrSrrr"


def test_the_policy_that_narrows_first_decides_which_branch_stays():
    early = plan_of("tgate:m=6", "adaptive_guidance:m=3", steps=9)
    assert [row.branches for row in early.rows] == [BOTH] * 3 + [("cond",)] * 6
    late = plan_of("tgate:m=3", "adaptive_guidance:m=6", steps=9)
    assert [row.branches for row in late.rows] == [BOTH] * 3 + [("uncond",)] * 6


def test_guidance_may_come_back():
    plan = plan_of("null_text:before=2", "deepcache:interval=3", steps=7)
    assert [len(row.branches) for row in plan.rows] == [1, 1, 2, 2, 2, 2, 2]
    assert columns(plan)["deepcache", "region 0"] == "SrSrrSr"


SHIPPED = ("tgate:m=5,sp_interval=2", "deepcache:interval=3", "adaptive_guidance:m=7", "null_text:after=9")


def test_the_order_of_specs_never_changes_the_plan():
    orders = list(itertools.permutations(SHIPPED))
    first = plan_of(*SHIPPED, steps=14)
    for specs in orders:
        plan = plan_of(*specs, steps=14)
        assert columns(plan) == columns(first)
        assert [row.branches for row in plan.rows] == [row.branches for row in first.rows]


def test_a_region_covers_only_what_is_inside():
    (outer, inner) = TOY.regions
    assert outer.covers("down.0.cross")
    assert not inner.covers("down.0.cross")
    assert not inner.covers("mid_block")
    assert inner.covers("mid")


def test_span_is_a_region_of_consecutive_blocks():
    assert TOY.span(0, 2) == Region("down.0..down.1", "down.1", ("down.0",), entry="down.0", streams=("x",))
    assert TOY.span(2, 3).skipped == ()


# -- what schedules and policies return ------------------------------------------------------------------------


class Odd(Script):
    def action(self, at):
        return "reuse" if at.step == 2 else super().action(at)


class Raising(Script):
    def action(self, at):
        return super().action(at) if at.step < 2 else 1 / 0


@pytest.mark.parametrize(
    ("when", "reason"),
    [(Odd, "returned 'reuse'; return an Action, or OPEN"), (Raising, "raised ZeroDivisionError: division by zero")],
)
def test_a_schedule_that_fails_is_one_line_with_policy_target_and_step(when, reason):
    class Bad(Scripted):
        def choices(self):
            return {name: choice.with_parts(when=when(actions="S")) for name, choice in super().choices().items()}

    with pytest.raises(PolicyError) as caught:
        plan_of(Bad(script="S"), steps=4)
    assert str(caught.value) == (f"scripted:script=S: action of script(actions=S) for 'mid.cross' at step 2 {reason}")


@pytest.mark.parametrize("answer", [None, "reuse", 1])
def test_full_returns_a_boolean(answer):
    class Vague(Every):
        def full(self, at):
            return at.step == 0 or answer

    with pytest.raises(TypeError, match=rf"full returned {answer!r}; return True or False"):
        [Vague(n=2).action(Moment(step, 4, target=Site("x", Kind.BLOCK))) for step in range(2)]


def test_the_branch_that_stays_is_one_of_the_run():
    class Lost(Guidance):
        def stays(self, layout):
            return "both"

    class Losing(Policy):
        name = "losing"

        def choices(self):
            return {"guidance": Choice(Lost(), After(m=1), Drop())}

    with pytest.raises(PolicyError, match=r"losing: stays of .* returned 'both'; return 'uncond' or 'cond'"):
        plan_of(Losing(), steps=3)


# -- conflicts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        ("tgate:m=5", "cair:n=5", "down.0.cross"),
        (Scripted(script="S", at="mid.self"), "tgate:sp_interval=2", "mid.self"),
        (Scripted(script="S", at="region 1"), "deepcache:interval=4", "region "),
    ],
)
def test_conflicts_name_both_policies_and_the_remedy(one, other, place, swap):
    with pytest.raises(ConflictError) as caught:
        plan_of(*((other, one) if swap else (one, other)))
    line = str(caught.value)
    for part in (repr(str(one)), repr(str(other)), place, "apply one of them"):
        assert part in line
    assert len(line.splitlines()) == 1


def test_null_text_refuses_a_gate_without_text():
    plan = plan_of("null_text:before=5", "tgate:m=5", steps=50)
    with pytest.raises(ConflictError, match="'null_text:before=5' takes the text away at step 4, where 'tgate:m=5'"):
        installed().check_plan(plan)
    installed().check_plan(plan_of("null_text:after=5", "tgate:m=5", steps=50))


NO_ATTENTION = SiteMap("Bare", (Site("mid", Kind.BLOCK), Site("mid.ff", Kind.FEED_FORWARD)))
JOINT = SiteMap("Joint", (Site("a", Kind.JOINT_ATTENTION),))


@pytest.mark.parametrize(
    ("spec", "sites", "message"),
    [
        ("tgate", JOINT, "looked for cross_attention, but Joint has joint_attention x 1"),
        ("deepcache", NO_ATTENTION, "looked for paired down and up blocks, but Bare has block x 1, feed_forward x 1"),
        ("deepcache:branch=2", TOY, "branch=2, but ToyUNet has branches 0..1"),
        ("tgate", SiteMap("Empty", ()), "Empty has no sites"),
    ],
)
def test_a_policy_without_a_target_is_refused(spec, sites, message):
    with pytest.raises(SiteError, match=message) as caught:
        plan_of(spec, sites=sites)
    assert str(caught.value).startswith(spec)


# -- what a plan shows -----------------------------------------------------------------------------------------


class Asked(Schedule):
    """Full in even steps, at feed-forward layers in odd ones if `reads` is how it looks at them."""

    name: ClassVar[str] = "asked"
    reads: str
    asked: ClassVar[list[int]] = []

    def full(self, at: Moment) -> bool:
        self.asked.append(at.step)
        seen = getattr(at, self.reads) if self.reads else None
        return at.step % 2 == (getattr(seen, "kind", seen) is Kind.FEED_FORWARD)


@pytest.mark.parametrize(("reads", "times"), [("", 1), ("kind", 2), ("target", 4)])
def test_a_schedule_is_asked_once_for_all_targets_that_it_cannot_tell_apart(reads, times, monkeypatch):
    monkeypatch.setattr(Asked, "asked", [])
    choice = Choice(Sites(kinds=("self_attention", "feed_forward")), Asked(reads=reads), Reuse())
    kinds = [Kind.SELF_ATTENTION, Kind.FEED_FORWARD] * 2
    targets = [Site(f"layer {place}", kind) for place, kind in enumerate(kinds)]
    plan = make_plan(tuple(Assignment(Scripted(script="."), choice, target) for target in targets), 6, Layout())
    assert sorted(Asked.asked) == sorted([*range(6)] * times)
    marks = [column[-1] for column in plan.columns()]
    assert marks == ["SrSrSr", "rSrSr." if reads else "SrSrSr"] * 2


def test_a_plan_prints_one_character_a_step():
    text = str(plan_of("tgate:m=2", "deepcache:interval=2", steps=12))
    lines = text.splitlines()
    assert lines[0].endswith("0         1 ")
    assert lines[1].endswith("012345678901")
    assert lines[2] == f"{'branches':{len(lines[1]) - 12}}221111111111"
    assert any(line.startswith("tgate:m=2  cross_attention x 3 ") and line.endswith(".Srrrrrrrrrr") for line in lines)
    assert lines[-1].startswith(". compute")


def test_a_plan_shows_what_only_the_run_can_decide():
    plan = plan_of("adaptive_guidance:threshold=0.99", "deepcache", steps=6)
    assert not plan.is_static
    assert columns(plan)["adaptive_guidance", "guidance"] == "??????"
    assert plan_of("deepcache").is_static
    assert plan_of().is_static
    assert "branches" in str(plan_of(steps=3))


def test_steps_with_one_signature_cost_the_same():
    plan = plan_of("tgate:m=13", "deepcache:interval=3", steps=25)
    assert len({row.signature for row in plan.rows}) == 5


# -- without torch ---------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import importlib.metadata, sys, cachekit.planning.plan, cachekit.interface.specs, cachekit.registry.catalog
points = importlib.metadata.entry_points(group="cachekit")
words = cachekit.registry.catalog.build(points, disabled=["unet", "dit"])  # adapters need torch
assert len(words.policies) >= 8, words.failures
print(cachekit.interface.specs.parse("tgate:m=5", words))
print(cachekit.interface.specs.parse("cache:where=denoiser,when=quadratic,what=hermite", words))
print(sorted({"torch", "diffusers", "transformers"} & set(sys.modules)))
"""


def test_specs_plans_and_every_policy_need_no_torch():
    output = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=True).stdout
    assert output.split() == ["tgate:m=5", "cache:where=denoiser,when=quadratic,what=hermite", "[]"]


def test_each_line_of_a_printed_plan_has_a_label_of_its_own():
    plan = plan_of("delta_dit:interval=2,boundary=2,blocks=1", steps=4)
    assert len({marks for *_, marks in plan.columns()}) == 2
    labels = [line.partition("  block x 1 ")[2] for line in str(plan).splitlines() if "block x" in line]
    assert len(labels) == len({label.partition("  ")[0] for label in labels}) == 2
