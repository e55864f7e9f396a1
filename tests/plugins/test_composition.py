"""Random compositions equal a loop that computes everything and then replaces it; reuse reads the last STORE."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import tiny
from support.scripted import TOY, InsistingScript, Scripted
from torch import nn

import cachekit
from cachekit import Action, BranchChange, Choice, Layout, Policy, Reuse, SiteMap, Sites
from cachekit.errors import ConflictError
from cachekit.registry.catalog import build, installed
from cachekit.upstream.pipelines import denoiser_of

Given = dict[str, dict[str, Any]]
BOTH = ("uncond", "cond")
MAKERS: dict[str, Callable[[], Any]] = {
    "sd": functools.partial(tiny.small, layers_per_block=1, sample_size=8),
    "pixart": tiny.pixart,
}


@functools.cache
def shared(name: str, role: str) -> Any:
    return MAKERS[name]()


class Naive:
    """Drive a denoiser step by step from the policies' definitions alone.

    All modules run in every step. Where a policy reuses, the output is thrown away and the kept one put in its
    place; where a branch is dropped, the inputs are cut and the output is doubled.
    """

    def __init__(self, denoiser: Any, policies: Given, steps: int, guided: bool) -> None:
        self.tgate, self.deepcache = policies.get("tgate"), policies.get("deepcache")
        self.adaptive, self.null_text = policies.get("adaptive_guidance"), policies.get("null_text")
        self.steps, self.order = steps, BOTH if guided else ("cond",)
        self.step, self.origin, self.crossed = -1, 0, False
        self.branches, self.narrowed = self.order, ""
        self.kept: dict[str, tuple[tuple[str, ...], torch.Tensor]] = {}
        self.difference: torch.Tensor | None = None
        self.owed: set[str] = set()
        self.denoiser, self.whole = denoiser, denoiser.forward
        denoiser.forward = self.forward
        watched = [name for name, _ in denoiser.named_modules() if name.endswith((".attn1", ".attn2"))]
        self.sites = [name for name in watched if self.action(name, 0)]
        self.handles = [self.hook(name, functools.partial(self.attention, name)) for name in self.sites]
        if self.deepcache:
            self.handles.append(self.hook(exit_of(denoiser, self.deepcache["branch"]), self.region))

    def hook(self, name: str, function: Callable[..., Any]) -> Any:
        return self.denoiser.get_submodule(name).register_forward_hook(lambda _, __, output: function(output))

    def close(self) -> None:
        del self.denoiser.forward
        for handle in self.handles:
            handle.remove()

    # -- which branches run ---------------------------------------------------------------------------------

    def votes(self) -> dict[str, str]:
        """The branch that each policy would run alone, by the policies' names."""
        votes = {}
        if self.adaptive and (self.crossed or self.step >= self.adaptive.get("m", 99)):
            votes["adaptive_guidance"] = "cond"
        text = self.null_text or {}
        if self.step >= text.get("after", 99) or self.step < text.get("before", 0):
            votes["null_text"] = "uncond"
        if self.tgate and self.step >= self.tgate["m"]:
            votes["tgate"] = "uncond"
        return votes if len(self.order) == 2 else {}

    def narrow(self) -> None:
        votes, before = self.votes(), self.branches
        if self.narrowed not in votes:
            self.narrowed = next(iter(votes), "")
        self.branches = (votes[self.narrowed],) if votes else self.order
        if self.branches == before:
            return
        self.kept.pop("region", None)
        self.origin = self.step
        means = {name: torch.stack(kept.chunk(2)).mean(0) for name, (who, kept) in self.kept.items() if who == BOTH}
        self.kept = {name: (self.branches, mean) for name, mean in means.items() if self.branches != BOTH}

    # -- what is reused -------------------------------------------------------------------------------------

    def action(self, name: str, step: int) -> str | None:
        """What TGATE does at an attention; None where it never does anything."""
        tgate = self.tgate
        if tgate is None or (name.endswith("1") and tgate["sp_interval"] == tgate["fi_interval"] == 1):
            return None
        m, warm_up = tgate["m"], tgate["warm_up"]
        if name.endswith("2"):
            return "keep" if step == m - 1 else "reuse" if step >= m else "compute"
        if step >= m:
            return "keep" if step % tgate["fi_interval"] == 0 else "reuse"
        if step < warm_up and step != m - 1:
            return "compute"
        return "keep" if step in (warm_up, m - 1) or step % tgate["sp_interval"] == 0 else "reuse"

    def is_read(self, name: str) -> bool:
        """Whether what is kept now is ever read."""
        after = [self.action(name, step) for step in range(self.step + 1, self.steps)]
        return next((action for action in after if action != "compute"), "keep") == "reuse"

    @property
    def is_full(self) -> bool:
        assert self.deepcache is not None
        # Cross-attention's one chance is the gate; what self-attention keeps waits for the next full step.
        cross = [name for name in self.sites if name.endswith("2")]
        inner = [name for name in cross if is_inside(self.denoiser, name, self.deepcache["branch"])]
        if any(self.action(name, self.step) == "keep" and self.is_read(name) for name in inner):
            self.origin = self.step
        return (self.step - self.origin) % self.deepcache["interval"] == 0

    def attention(self, name: str, output: torch.Tensor) -> torch.Tensor:
        if self.deepcache and not self.full and is_inside(self.denoiser, name, self.deepcache["branch"]):
            if self.action(name, self.step) == "keep" and self.is_read(name):
                self.owed.add(name)
            return output
        action = self.action(name, self.step)
        if name in self.owed:
            self.owed.remove(name)
            action = "keep" if action == "reuse" else action
        return output if action == "compute" else self.exchange(name, output, action == "reuse")

    def region(self, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        found = self.exchange("region", tensor, not self.full).clone()
        return (found,) if isinstance(output, tuple) else found

    def exchange(self, name: str, output: torch.Tensor, reuse: bool) -> torch.Tensor:
        who, kept = self.kept.get(name, ((), output))
        if reuse and who == self.branches:
            return kept
        self.kept[name] = (self.branches, output.clone())
        return output

    # -- the call -------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.step += 1
        self.narrow()
        self.full = bool(self.deepcache) and self.is_full
        if not self.narrowed:
            output = self.whole(*args, **kwargs)
            self.compare(output[0])
            return output
        half = BOTH.index(self.branches[0])
        (alone,) = self.whole(*tiny.cut(args, half), **tiny.cut(kwargs, half))
        takes_difference = self.narrowed == "adaptive_guidance" and self.difference is not None
        return (torch.cat([alone - self.difference if takes_difference else alone, alone]),)

    def compare(self, output: torch.Tensor) -> None:
        if not self.adaptive or len(self.order) == 1:
            return
        u, c = output.chunk(2)
        if "threshold" in self.adaptive:
            gamma = torch.cosine_similarity(c.flatten(1).float(), u.flatten(1).float()).min()
            self.crossed = float(gamma) >= self.adaptive["threshold"]
        if self.adaptive["linear"] and self.step == self.adaptive.get("m", self.step + 1) - 1:
            self.difference = c - u


def exit_of(unet: Any, branch: int) -> str:
    """Name the module whose output enters the up layer of a branch."""
    layers = unet.config.layers_per_block + 1
    depth, layer = divmod(branch, layers)
    up, last = len(unet.up_blocks) - 1 - depth, layers - 2 - layer
    if last >= 0:
        part = "attentions" if hasattr(unet.up_blocks[up], "attentions") else "resnets"
        return f"up_blocks.{up}.{part}.{last}"
    return f"up_blocks.{up - 1}" if up else "mid_block"


def is_inside(unet: Any, name: str, branch: int) -> bool:
    """Whether an attention lies deeper than the skip connection of a branch."""
    layers = unet.config.layers_per_block + 1
    depth, layer = divmod(branch, layers)
    part, number, _, index, *_ = name.split(".")
    if part == "mid_block":
        return True
    if part == "down_blocks":
        return (int(number), int(index)) >= (depth, layer)
    own = len(unet.up_blocks) - 1 - int(number)
    return own > depth or (own == depth and int(index) < layers - 1 - layer)


# -- compositions ----------------------------------------------------------------------------------------------

SOON = st.integers(1, 5)
ADAPTIVE = st.fixed_dictionaries({"m": SOON, "linear": st.booleans()}) | st.fixed_dictionaries(
    {"threshold": st.sampled_from([-1.0, 0.99, 1.0]), "linear": st.booleans()}
)
TEXT = st.sampled_from([{"after": 0}, {"after": 2}, {"after": 4}, {"before": 1}, {"before": 2, "after": 3}])
TGATE = {"m": SOON, "sp_interval": st.integers(1, 3), "fi_interval": st.integers(1, 3), "warm_up": st.integers(0, 3)}
REGION = {"interval": st.integers(2, 4), "branch": st.integers(0, 3)}


def compositions(name: str) -> Any:
    every = {"tgate": st.fixed_dictionaries(TGATE), "adaptive_guidance": ADAPTIVE, "null_text": TEXT}
    if name == "sd":
        every["deepcache"] = st.fixed_dictionaries(REGION)
    chosen = st.sets(st.sampled_from(sorted(every)), min_size=2)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({policy: every[policy] for policy in sorted(names)}))


@pytest.mark.parametrize("name", MAKERS)
def test_any_composition_equals_the_naive_loop(name: str) -> None:
    pipe, other = shared(name, "cached"), shared(name, "naive")

    @given(compositions(name), st.integers(4, 8), st.integers(1, 2), st.sampled_from([5.0, 1.0]))
    @settings(max_examples=40, deadline=None, derandomize=True)
    def check(policies: Given, steps: int, batch: int, guidance: float) -> None:
        # Without a difference to go on with, both branches run; see test_guidance.
        text, linear = policies.get("null_text", {}), policies.get("adaptive_guidance", {})
        assume(not (text and linear.get("linear")))
        specs = [installed().policies[policy](**fields) for policy, fields in policies.items()]
        call = {"steps": steps, "batch": batch, "guidance": guidance}
        try:
            attachment = cachekit.apply(pipe, specs)
        except ConflictError:
            assume(False)
        with attachment:
            found = tiny.latents(pipe, **call)
        naive = Naive(denoiser_of(other), policies, steps, guidance > 1)
        try:
            assert torch.equal(found, tiny.latents(other, **call))
        finally:
            naive.close()

    check()


# -- what a run hands out, whatever the plan -------------------------------------------------------------------


class Tagger(nn.Module):
    """Tag each part of the batch with its branch and the time, so that reused tensors show where they come from."""

    def forward(self, who: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        return torch.stack([who, now.expand_as(who)], dim=1)


class Block(Tagger):
    """Contain sites, and record their outputs."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.given: dict[str, torch.Tensor] = {}
        for name in names:
            self.add_module(name, Tagger())

    def forward(self, who: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        self.given.update({name: child(who, now) for name, child in self.named_children()})
        return super().forward(who, now)


class Tagged(nn.Module):
    """A denoiser with the modules that `TOY` names."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList([Block("cross"), Block("cross")]), nn.ModuleList([Tagger()])
        self.mid = Block("cross", "self")
        self.given: dict[str, torch.Tensor] = {}

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        self.given.clear()
        for name, module in (("down.0", self.down[0]), ("down.1", self.down[1]), ("mid", self.mid), ("", self.up[0])):
            found = module(encoder_hidden_states, timestep)
            self.given |= {f"{name}.{site}": tag for site, tag in getattr(module, "given", {}).items()}
            getattr(module, "given", {}).clear()
        self.given["region 1"] = found
        return (sample,)


class TaggedAdapter:
    name, summary = "tagged", "modules whose outputs show where they come from"

    def matches(self, denoiser: Any) -> bool:
        return isinstance(denoiser, Tagged)

    def sites(self, denoiser: Any) -> SiteMap:
        return TOY

    def layout(self, denoiser: Any) -> Layout:
        return Layout(BOTH)


# Without the plugins' objections to plans.
CATALOG = dataclasses.replace(build([]), policies=installed().policies, adapters={"tagged": TaggedAdapter()})
PLACES = ("down.0.cross", "down.1.cross", "mid.cross", "mid.self", "region 1")
SCRIPTS = st.dictionaries(st.sampled_from(PLACES), st.text(".Sr", min_size=1, max_size=7), min_size=1)
NARROWING = st.lists(st.sampled_from(["adaptive_guidance:m=2", "null_text:before=2", "null_text:after=4"]), max_size=1)


@given(SCRIPTS, st.sampled_from(list(BranchChange)), NARROWING, st.integers(2, 9))
@settings(max_examples=100, deadline=None)
def test_what_is_reused_was_kept_last_and_by_the_same_branches(
    scripts: dict[str, str], rule: BranchChange, narrowing: list[str], steps: int
) -> None:
    specs = [scripted(number, place, script, rule) for number, (place, script) in enumerate(scripts.items())]
    denoiser, table = Tagged(), torch.arange(steps, dtype=torch.float64)
    sample, who = torch.zeros(2, 1), torch.tensor([0.0, 1.0], dtype=torch.float64)
    given: list[dict[str, torch.Tensor]] = []
    with cachekit.apply(denoiser, [*narrowing, *specs], catalog=CATALOG) as attachment:
        for now in table:
            denoiser(sample, now, who)
            given.append(dict(denoiser.given))
        calls, bounds = attachment.report().record.calls, attachment.setup.assignments
    for index, bound in enumerate(bounds):
        at, last = bound.target.name, None
        for step, (call, tags) in enumerate(zip(calls, given)):
            if at not in tags:
                continue
            action = call.row.actions[index]
            last = step if action is Action.STORE else last
            (branches, times), own = tags[at].T, [float(BOTH.index(branch)) for branch in call.row.branches]
            assert times.tolist() == [last if action is Action.REUSE else step] * len(own)
            assert branches.tolist() == own or (rule is BranchChange.MEAN and branches.tolist() == [0.5])


def scripted(number: int, place: str, script: str, rule: BranchChange) -> Any:
    names = {"name": f"scripted_{number}", "change": rule, "__module__": __name__}
    return type("Ruled", (Scripted,), names)(script=script, at=place, insists=True)


def test_costs_count_a_reuse_of_what_was_dropped_and_kept_anew() -> None:
    """Equal calls are counted once, except for one that keeps again what was dropped, which a later call reads."""

    class Columns(Policy):
        summary: ClassVar[str] = "follow a column of marks"
        kind: ClassVar[str] = "cross_attention"
        column: str

        def choices(self) -> dict[str, Choice]:
            return {"column": Choice(Sites(kinds=self.kind), InsistingScript(actions=self.column), Reuse())}

    class OnAttention(Columns):
        name: ClassVar[str] = "on_attention"

    class OnFeedForward(Columns):
        name: ClassVar[str] = "on_feed_forward"
        kind: ClassVar[str] = "feed_forward"

    pipe = tiny.small()
    with cachekit.apply(pipe, [OnAttention(column="SrSSr"), OnFeedForward(column="..S.r")]) as attachment:
        tiny.latents(pipe, steps=5)
    report = attachment.report()
    assert not any(report.record.missed)
    full, attention, _, _, both = report.cost.per_call
    with cachekit.apply(pipe, OnFeedForward(column="S...r")) as attachment:
        tiny.latents(pipe, steps=5)
    assert full - both == (full - attention) + (full - attachment.report().cost.per_call[4])
