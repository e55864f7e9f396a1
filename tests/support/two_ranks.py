"""Scenarios that two processes run with one pipeline each, and the process that runs them, for test_ranks.py."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from diffusers import ContextParallelConfig, FluxPipeline, WanPipeline
from torch import distributed

import cachekit
from cachekit import OPEN, Action, Choice, Indicator, Policy, Reuse, Schedule, Where
from cachekit.interface.sites import Region
from cachekit.runs.keeping import Keeper
from cachekit.runs.voting import Vote
from support import tiny

STEPS, TOKENS = 6, 8
#: Time after which a process that waits for the other one fails.
PATIENCE, LITTLE_PATIENCE = timedelta(seconds=40), timedelta(seconds=4)


# -- pipelines whose transformers can be split between processes ---------------------------------------------------


def flux() -> FluxPipeline:
    """Pipeline with one branch; its inputs are split before the transformer."""
    return tiny.flux(layers=(1, 4))


def wan() -> WanPipeline:
    """Pipeline with a call for each branch; its tokens are split before block 0."""
    return tiny.wan()


def image(pipe: Any, seed: int = 0) -> torch.Tensor:
    given: dict[str, Any] = {"prompt_embeds": embedded(3)}
    if isinstance(pipe, WanPipeline):
        given |= {"negative_prompt_embeds": embedded(4), "height": 64, "width": 64}
    return tiny.latents(pipe, steps=STEPS, guidance=4.0, seed=seed, **given)


def embedded(seed: int) -> torch.Tensor:
    """Embeddings of a prompt whose tokens two processes can share."""
    return torch.randn(1, TOKENS, tiny.WIDTH, generator=torch.Generator().manual_seed(seed))


# -- policies that decide by what they see -------------------------------------------------------------------------


class BehindTheFirst(Where):
    """All blocks of the last chain but its first, as one region; with the first as its probe if `probed`."""

    name: ClassVar[str] = "behind_the_first"
    probed: bool = True

    def find(self, sites: Any) -> list[Region]:
        chain = sites.chains[-1]
        region = sites.span(1, len(chain), len(sites.chains) - 1)
        return [replace(region, probe=chain[0].name) if self.probed else region]


#: Actions that the policies of this process asked for in the current run, before the vote.
WISHES: list[Action] = []


class Open(Schedule):
    """Base of schedules that decide in the run."""

    name: ClassVar[str] = "open"

    def action(self, at: Any) -> Any:
        return OPEN


class Changed(Indicator):
    """Computed where one part of the tokens has changed since the last step by `limit`."""

    name: ClassVar[str] = "changed"
    limit: float
    parts: int

    def needs(self, signal: Any, at: Any) -> bool:
        last, new = at.memory.get("last"), signal.left[0]
        if last is None:
            return noted(Action.STORE) is Action.STORE
        pairs = zip(new.chunk(self.parts, 1), last.chunk(self.parts, 1))
        changes = [float((new - old).abs().mean() / new.abs().mean()) for new, old in pairs]
        return noted(Action.REUSE if max(changes) < self.limit else Action.STORE) is Action.STORE

    def took(self, signal: Any, at: Any, full: bool) -> None:
        at.memory["last"] = signal.left[0]


class Wished(Open):
    """Reused on the first process only, from the second step on."""

    def decide(self, at: Any) -> Action:
        return wish(at.step)


class WishedBySignal(Indicator):
    """The same, decided within the call."""

    name: ClassVar[str] = "wished_by_signal"

    def needs(self, signal: Any, at: Any) -> bool:
        return wish(at.step) is Action.STORE


class ByProbe(Policy):
    """Skip all blocks but the first while the first one's output changes little from step to step.

    The tokens are split into `parts` equal parts, as processes split them; all are computed if one part has changed.
    """

    name: ClassVar[str] = "by_probe"

    limit: float = 0.3
    parts: int = 1

    def choices(self) -> dict[str, Choice]:
        return {"blocks": Choice(BehindTheFirst(), Changed(limit=self.limit, parts=self.parts), Reuse())}


def noted(action: Action) -> Action:
    WISHES.append(action)
    return action


class Stubborn(Policy):
    """Skip on the first process only, from the second step on, whatever its probe shows."""

    name: ClassVar[str] = "stubborn"
    probed: bool = True

    def choices(self) -> dict[str, Choice]:
        return {
            "blocks": Choice(BehindTheFirst(probed=self.probed), WishedBySignal() if self.probed else Wished(), Reuse())
        }


def wish(step: int) -> Action:
    return noted(Action.REUSE if step and distributed.get_rank() == 0 else Action.STORE)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Keep NaN at step 2 on the second process."""

    def push(keeper: Any, slot: Any, branches: Any, entry: Any, *rest: Any) -> None:
        if entry.at.step == 2 and rank() == 1:
            entry = entry._replace(tensors=tuple(stream * float("nan") for stream in entry.tensors))
        held(keeper, slot, branches, entry, *rest)

    held, Keeper.push = Keeper.push, push
    try:
        yield
    finally:
        Keeper.push = held


def run_poisoned(pipe: Any) -> dict[str, Any]:
    """Compute every second step, and keep NaN once."""
    with poisoned():
        return run(pipe, "cache:where=span(first=1),when=every(2)")


# -- what both processes do ----------------------------------------------------------------------------------------


def run(pipe: Any, *specs: Any, seed: int = 0) -> dict[str, Any]:
    """Run the pipeline under `specs`: latents, actions asked for, actions done, calls, bytes and MACs."""
    if not specs:
        return {"image": image(pipe, seed)}
    WISHES.clear()
    with cachekit.apply(pipe, specs) as attachment:
        found = image(pipe, seed)
        report = attachment.report()
    done = [[action.value for action in made.row.actions] for made in report.record.calls]
    ran = sum(not made.dropped for made in report.record.calls)
    wishes = [action.value for action in WISHES]
    # Only the first process asks for costs: counting them needs no vote.
    macs = report.macs if rank() == 0 and specs == (SPAN,) else None
    return {"image": found, "done": done, "wishes": wishes, "ran": ran, "bytes": report.cache_bytes, "macs": macs}


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def split(pipe: Any) -> Any:
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    return pipe


def late(pipe: Any, *specs: Any) -> dict[str, Any]:
    """Apply, and split the transformer afterwards."""
    with cachekit.apply(pipe, specs):
        split(pipe)
        return {"image": image(pipe)}


def undone(pipe: Any, *specs: Any) -> dict[str, Any]:
    run(split(pipe), *specs)
    return {"image": image(pipe)}


def shared(make: Callable[[], Any], *specs: Any) -> Callable[[], dict[str, Any]]:
    return lambda: run(split(make()), *specs)


def images_of_its_own(*specs: Any) -> dict[str, Any]:
    """Make two images on each process."""
    with PartialState(cpu=True).split_between_processes([0, 1, 2, 3]) as seeds:
        return {seed: run(wan(), *specs, seed=seed) for seed in seeds}


def without_a_vote(store: Path) -> dict[str, Any]:
    """Share an image between processes that disagree and do not vote."""
    with joined(LITTLE_PATIENCE, store), unanimous():
        try:
            return run(split(wan()), Stubborn())
        except RuntimeError as error:
            return {"error": str(error)}


@contextlib.contextmanager
def unanimous() -> Iterator[None]:
    """Replace the vote: each process does what its own policies ask for."""
    held, Vote.__call__ = Vote.__call__, lambda self, action: action
    try:
        yield
    finally:
        Vote.__call__ = held


FORECAST = "forecast:interval=2"
SPAN, OBSERVED = "delta_dit:boundary=3", "adaptive_guidance:threshold=0.925"
#: Runs of one process, by the name of the scenario in `SHARED` that must give the same.
ALONE = {
    "flux": lambda: run(flux()),
    "flux, delta_dit": lambda: run(flux(), SPAN),
    "wan": lambda: run(wan()),
    "wan, tgate": lambda: run(wan(), "tgate:keep=cond,m=3"),
    "wan, delta_dit": lambda: run(wan(), SPAN),
    "wan, observed": lambda: run(wan(), OBSERVED),
    "wan, forecast": lambda: run(wan(), FORECAST),
    "flux, forecast": lambda: run(flux(), FORECAST),
    "wan, probed": lambda: run(wan(), ByProbe(parts=2)),
}
SHARED = {
    "flux": shared(flux),
    "flux, nothing": shared(flux, "delta_dit:interval=1"),
    "flux, delta_dit": shared(flux, SPAN),
    "flux, stubborn": shared(flux, Stubborn()),
    "wan": shared(wan),
    "wan, nothing": shared(wan, "delta_dit:interval=1", "adaptive_guidance:m=99"),
    "wan, tgate": shared(wan, "tgate:keep=cond,m=3"),
    "wan, delta_dit": shared(wan, SPAN),
    "wan, delta_dit, split late": lambda: late(wan(), SPAN),
    "wan, delta_dit, undone": lambda: undone(wan(), SPAN),
    "wan, observed": shared(wan, OBSERVED),
    "wan, forecast": shared(wan, FORECAST),
    "flux, forecast": shared(flux, FORECAST),
    "wan, probed": shared(wan, ByProbe()),
    "wan, stubborn": shared(wan, Stubborn()),
    "wan, stubborn ahead": shared(wan, Stubborn(probed=False)),
    "wan, poisoned": lambda: run_poisoned(split(wan())),
}
OWN = {
    "observed": functools.partial(images_of_its_own, OBSERVED),
    "stubborn": functools.partial(images_of_its_own, Stubborn()),
}


@contextlib.contextmanager
def joined(patience: timedelta, store: Path) -> Iterator[None]:
    """Join the other process; waiting for it longer than `patience` is an error."""
    rank = int(os.environ["RANK"])
    meeting = distributed.FileStore(str(store), 2)
    distributed.init_process_group("gloo", timeout=patience, world_size=2, rank=rank, store=meeting)
    distributed.barrier()
    try:
        yield
    finally:
        distributed.destroy_process_group()


def work(rank: int, folder: Path) -> None:
    """Run all scenarios as process `rank` of two, and write the results into `folder`."""
    torch.set_num_threads(1)
    # diffusers names a device by the rank modulo the number of accelerators, which is 0 here.
    torch.accelerator.device_count = lambda: 1
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ |= dict(zip(names, (str(rank), str(rank), "2", "localhost", "0")))
    with joined(PATIENCE, folder / "store"):
        found: dict[str, Any] = {name: scenario() for name, scenario in (SHARED | OWN).items()}
        distributed.barrier()
    found["without a vote"] = without_a_vote(folder / "another store")
    torch.save(found, folder / f"{rank}.pt")
