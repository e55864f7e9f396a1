"""Measure the overhead of attached policies, beside published packages and hand-written loops.

`python -m benchmarks.overhead --model demo|sd15 --output FILE` runs the contenders of a comparison in turns, a step of
the loop each, so that a machine that slows down slows all of them. Each has a copy of the pipeline with shared weights,
and the copies change roles from round to round, so that none has the luckier place in memory. Of each step the median
over the rounds is taken, and ratios are of the sums over the steps. In the same rounds the plain pipeline is compared
with another copy of it: what that ratio differs from 1 by, the machine adds to the others. All times are written.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import cachekit
from benchmarks.by_hand import Run, loop_by_hand
from cachekit.models.demo import DEMO_GUIDANCE, heldout_captions
from cachekit.tools.bench.cells import Setting
from cachekit.tools.bench.peers import twin
from cachekit.tools.bench.subjects import load

STEPS = {"demo": 25, "sd15": 10}
PIXELS = {"sd15": 256}
#: Makes runs of copies of a pipeline, and leaves the copies as they were.
Contest = Callable[[Sequence[Any], dict[str, Any]], AbstractContextManager[Sequence[Run]]]
#: How the process allocates memory: freed memory is used again instead of being returned to the system, whose page
#: faults would take half of the time on a CPU and differ from run to run.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(STEPS), default="demo")
    parser.add_argument(
        "--rounds", type=int, default=0, help="rounds of each comparison; default: 24 for demo, 6 for sd15"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overhead.json"))
    options = parser.parse_args()
    if MALLOC.items() - os.environ.items():
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.overhead", *sys.argv[1:]], {**os.environ, **MALLOC}
        )
    torch.set_num_threads(options.threads)
    rounds = options.rounds or {"demo": 24, "sd15": 6}[options.model]
    measured: dict[str, Any] = {"comparisons": {}}
    for name, result in measure(options.model, rounds):
        noise = f", noise {result['noise']:.4f}" if "noise" in result else ""
        print(f"{options.model}: {name}: {result['ratio']:.4f}, CPU {result['cpu_ratio']:.4f}{noise}", flush=True)
        measured["comparisons"][name] = result
        append(options.output, options.model, measured, options.threads)  # a run that is interrupted keeps these
    measured["deciding_ms"] = deciding_ms(options.model, rounds)
    print(f"{options.model}: deciding, ms per step: {measured['deciding_ms']:.3f}")
    append(options.output, options.model, measured, options.threads)


def append(output: Path, model: str, measured: dict[str, Any], threads: int) -> None:
    """Write the figures of a model into the file, which keeps those of other models."""
    held = json.loads(output.read_text()) if output.exists() else {}
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
        "threads": threads,
    }
    held[model] = {"steps": STEPS[model], "environment": environment, **measured}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(held, indent=1) + "\n")


def measure(model: str, rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure the times and ratios of each comparison on one model."""
    pipe, arguments = prepare(model)
    copies = [twin(pipe) for _ in range(3)]
    contest = Comparison(copies, arguments, rounds, warms_up=model == "demo")
    yield "attached no-op / plain", contest.compare(no_op, 3)
    for branch in (0, 1):
        name = f"cachekit deepcache / published DeepCache, branch {branch}"
        yield name, contest.compare(partial(deepcache, branch=branch), 2)
    yield "cachekit tgate / published tgate", contest.compare(tgate, 2)
    if model == "demo":  # on a true size the loops by hand take long and say the same
        ours = contest.compare(cached_and_plain, 2)
        yield "cachekit tgate / plain", ours
        hands = contest.compare(by_hand, 2)
        yield "tgate by hand / plain loop by hand", hands
        ratios = {name: hands[name] / ours[name] for name in ("ratio", "cpu_ratio")}
        yield "speedup of cachekit tgate / of tgate by hand", {**ratios, "seconds": []}


@dataclass(frozen=True)
class Comparison:
    """How contenders are compared: copies of a pipeline, the arguments of a call, and the number of rounds.

    `warms_up` is whether each round begins with a run that isn't timed, in which plans are made; where runs take long,
    only the first round does.
    """

    copies: Sequence[Any]
    arguments: dict[str, Any]
    rounds: int
    warms_up: bool

    def compare(self, contest: Contest, count: int) -> dict[str, Any]:
        """Time `count` runs in turns: their seconds, and the ratio of the first to the second.

        A third run does the same as the second, so their ratio is noise.
        """
        found: list[list[list[Lap]]] = [[] for _ in range(count)]
        orders = list(itertools.permutations(range(count)))
        with ExitStack() as stack:
            # A thread for each run, so that none has the warmer one.
            threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(count)]
            for round_ in range(self.rounds):
                turned = [self.copies[(place + round_) % count] for place in range(count)]
                with contest(turned, self.arguments) as runs:
                    if self.warms_up or not round_:
                        in_turns(threads, runs, orders[round_ % len(orders)])
                    for place, laps in enumerate(in_turns(threads, runs, orders[round_ % len(orders)])):
                        found[place].append(laps)
        wall, cpu = ([typical([[lap[kind] for lap in laps] for laps in each]) for each in found] for kind in (0, 1))
        ratios = {"ratio": wall[0] / wall[1], "cpu_ratio": cpu[0] / cpu[1]}
        if count > 2:
            ratios |= {"noise": wall[2] / wall[1], "cpu_noise": cpu[2] / cpu[1]}
        times = [[[round(lap[0], 5) for lap in laps] for laps in each] for each in found]
        return {**ratios, "seconds": wall[:2], "times": times}


#: The seconds of one turn, of wall and of CPU.
Lap = tuple[float, float]


def typical(rounds: Sequence[Sequence[float]]) -> float:
    """Add up the medians over the rounds of each step's seconds."""
    return float(sum(map(median, zip(*rounds))))


def in_turns(threads: Sequence[ThreadPoolExecutor], runs: Sequence[Run], order: Sequence[int]) -> list[list[Lap]]:
    """Make all runs in turns, and get the laps of each."""
    turns = Turns(order)
    waiting = [thread.submit(turns.take, place, *run) for place, (thread, run) in enumerate(zip(threads, runs))]
    return [future.result() for future in waiting]


class Turns:
    """The turns of several loops, of which one runs at a time: each makes a step, and waits for all others.

    A run that raises ends its turns like one that has finished, so the others are not left waiting.
    """

    def __init__(self, order: Sequence[int]) -> None:
        """Begin with the first of `order`."""
        self._waiting = list(order)
        self._changed = threading.Condition()
        self._laps: dict[int, list[Lap]] = {place: [] for place in order}
        self._begun = (0.0, 0.0)

    def take(self, place: int, run: Callable[[], Any], scheduler: Any) -> list[Lap]:
        """Run a loop whose turns end with the scheduler's steps, and get its laps."""
        step = scheduler.step

        def stepped(*args: Any, **kwargs: Any) -> Any:
            made = step(*args, **kwargs)
            self._end(place)
            self._begin(place)
            return made

        scheduler.step = stepped
        self._begin(place)
        try:
            run()
        finally:
            del scheduler.step
            self._end(place)
            with self._changed:
                self._waiting.remove(place)
                self._changed.notify_all()
        return self._laps[place]

    def _begin(self, place: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting[0] == place)
        self._begun = (time.perf_counter(), time.process_time())

    def _end(self, place: int) -> None:
        now = (time.perf_counter(), time.process_time())
        self._laps[place].append((now[0] - self._begun[0], now[1] - self._begun[1]))
        with self._changed:
            self._waiting.append(self._waiting.pop(0))
            self._changed.notify_all()


def prepare(model: str) -> tuple[Any, dict[str, Any]]:
    """Load a pipeline, and the arguments of a run that returns latents."""
    if model == "demo":
        pipe = cachekit.demo_pipeline("unet")
        given = {"prompt": heldout_captions(1, seed=0)[0], "guidance_scale": DEMO_GUIDANCE}
    else:
        # An architecture gets random weights: right for times.
        side = PIXELS[model]
        subject = load(Setting(model=model, captions=(), device="cpu", height=side, width=side))
        pipe, given = subject.pipe, dict(subject.arguments(""))
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**given, "num_inference_steps": STEPS[model], "output_type": "latent"}


@contextmanager
def no_op(copies: Sequence[Any], arguments: dict[str, Any]) -> Iterator[Sequence[Run]]:
    """Make a run with all switches installed that change nothing, the plain run, and another plain run."""
    steps = arguments["num_inference_steps"]
    with cachekit.apply(copies[0], [f"tgate:m={steps}", "deepcache:interval=1", f"adaptive_guidance:m={steps}"]):
        yield [called(copy, arguments) for copy in copies]


def called(pipe: Any, arguments: dict[str, Any]) -> Run:
    """Make a run of a pipeline."""
    return lambda: pipe(**arguments), pipe.scheduler


@contextmanager
def tgate(copies: Sequence[Any], arguments: dict[str, Any]) -> Iterator[Sequence[Run]]:
    """Make runs with TGATE by cachekit and by the published package, which can't be undone: on a copy of its own."""
    from tgate import TgateSDLoader

    gate, theirs = gate_of(arguments), twin(copies[1])
    published = TgateSDLoader(theirs)
    schedule = {"gate_step": gate, "sp_interval": 1, "fi_interval": 1, "warm_up": 0}
    with cachekit.apply(copies[0], f"tgate:m={gate}"):
        yield called(copies[0], arguments), (lambda: published.tgate(**arguments, **schedule), theirs.scheduler)


def deciding_ms(model: str, rounds: int) -> float:
    """Measure the time per step that goes into locating calls and deciding, with two policies: the median, in ms."""
    pipe, arguments = prepare(model)
    steps = arguments["num_inference_steps"]
    with cachekit.apply(pipe, [f"tgate:m={gate_of(arguments)}", "deepcache:interval=3"]) as attachment:
        seconds = []
        for _ in range(rounds):
            pipe(**arguments)
            seconds.append(attachment.report().deciding_seconds)
    return float(median(seconds) / steps * 1e3)


def gate_of(arguments: dict[str, Any]) -> int:
    """Choose the gate step: two fifths of the steps are guided."""
    return max(1, int(arguments["num_inference_steps"]) * 2 // 5)


@contextmanager
def cached_and_plain(copies: Sequence[Any], arguments: dict[str, Any]) -> Iterator[Sequence[Run]]:
    """Make a run with TGATE, and the plain run."""
    with cachekit.apply(copies[0], f"tgate:m={gate_of(arguments)}"):
        yield called(copies[0], arguments), called(copies[1], arguments)


@contextmanager
def by_hand(copies: Sequence[Any], arguments: dict[str, Any]) -> Iterator[Sequence[Run]]:
    """Make a minimal sampling loop with TGATE's schedule, and the same loop without it."""
    gates = (gate_of(arguments), arguments["num_inference_steps"])
    yield [loop_by_hand(copy, arguments, gate) for copy, gate in zip(copies, gates)]


@contextmanager
def deepcache(copies: Sequence[Any], arguments: dict[str, Any], branch: int) -> Iterator[Sequence[Run]]:
    """Make runs with DeepCache by cachekit and by the published package."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=copies[1])
    helper.set_params(cache_interval=3, cache_branch_id=branch)

    def published() -> None:
        helper.enable()
        copies[1](**arguments)
        helper.disable()

    with cachekit.apply(copies[0], f"deepcache:interval=3,branch={branch}"):
        yield called(copies[0], arguments), (published, copies[1].scheduler)


if __name__ == "__main__":
    main()
