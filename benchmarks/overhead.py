"""Measure the overhead of attached policies, beside published packages and hand-written loops.

`python -m benchmarks.overhead --model demo|sd15 --output FILE` alternates the contenders within one process and
writes every time and the median ratios as JSON. In the same rounds the plain pipeline is compared with its own copy:
what that ratio differs from 1 by, the machine adds to the others. CPU times suffer less from other processes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import cachekit
from cachekit.bench.cells import Setting
from cachekit.bench.peers import twin
from cachekit.bench.subjects import load
from cachekit.models.demo import DEMO_GUIDANCE, heldout_captions

STEPS = {"demo": 25, "sd15": 10}
PIXELS = {"sd15": 256}
Run = Callable[[], Any]
#: How the process allocates memory: freed memory is used again instead of being returned to the system, whose page
#: faults would take half of the time on a CPU and differ from run to run.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_TOP_PAD_": "67108864"}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(STEPS), default="demo")
    parser.add_argument(
        "--rounds", type=int, default=0, help="pairs of runs per comparison; default: 25 for demo, 5 for sd15"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/overhead.json"))
    options = parser.parse_args()
    if MALLOC.items() - os.environ.items():
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.overhead", *sys.argv[1:]], {**os.environ, **MALLOC}
        )
    torch.set_num_threads(options.threads)
    rounds = options.rounds or {"demo": 25, "sd15": 5}[options.model]
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
    yield "attached no-op / plain", compare(no_op(pipe, arguments), rounds)
    for branch in (0, 1):
        name = f"cachekit deepcache / published DeepCache, branch {branch}"
        yield name, compare(deepcache(pipe, arguments, branch), rounds)
    yield "cachekit tgate / published tgate", compare(tgate(pipe, arguments), rounds)
    if model == "demo":  # on a true size the loops by hand take long and say the same
        yield from measure_by_hand(pipe, arguments, rounds)


def measure_by_hand(pipe: Any, arguments: dict[str, Any], rounds: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Compare the speedup of TGATE with that of a minimal loop by hand."""
    ours = compare(cached_and_plain(pipe, arguments), rounds)
    yield "cachekit tgate / plain", ours
    hands = compare(by_hand(pipe, arguments), rounds)
    yield "tgate by hand / plain loop by hand", hands
    ratios = {name: hands[name] / ours[name] for name in ("ratio", "cpu_ratio")}
    yield "speedup of cachekit tgate / of tgate by hand", {**ratios, "seconds": []}


def compare(runs: Sequence[Run], rounds: int) -> dict[str, Any]:
    """Time two or three runs in turn, after a warm-up each: median seconds, and the medians of the ratios of pairs.

    The first is compared with the second; the third, if there is one, with the second too: it does the same, so its
    ratio is noise.
    """
    for run in runs:
        run()
    wall: list[list[float]] = [[] for _ in runs]
    cpu: list[list[float]] = [[] for _ in runs]
    orders = list(itertools.permutations(range(len(runs))))
    for round_ in range(rounds):
        # They take turns to go first, so that a machine that slows down favours none.
        for place in orders[round_ % len(orders)]:
            start = time.perf_counter(), time.process_time()
            runs[place]()
            wall[place].append(time.perf_counter() - start[0])
            cpu[place].append(time.process_time() - start[1])
    found = {"ratio": pairs(wall[0], wall[1]), "cpu_ratio": pairs(cpu[0], cpu[1])}
    if len(runs) > 2:
        found |= {"noise": pairs(wall[2], wall[1]), "cpu_noise": pairs(cpu[2], cpu[1])}
    return {**found, "seconds": [median(wall[0]), median(wall[1])], "times": wall, "cpu_times": cpu}


def pairs(one: Sequence[float], other: Sequence[float]) -> float:
    """Compute the median of the ratios of pairs."""
    return median(first / second for first, second in zip(one, other))


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


def no_op(pipe: Any, arguments: dict[str, Any]) -> tuple[Run, Run, Run]:
    """Make a run with all switches installed that change nothing, the plain run, and the plain run of a copy."""
    steps = arguments["num_inference_steps"]
    attached, plain = twins(pipe)
    copy = twin(plain)
    cachekit.apply(attached, [f"tgate:m={steps}", "deepcache:interval=1", f"adaptive_guidance:m={steps}"])
    return lambda: attached(**arguments), lambda: plain(**arguments), lambda: copy(**arguments)


def tgate(pipe: Any, arguments: dict[str, Any]) -> tuple[Run, Run]:
    """Make runs with TGATE by cachekit and by the published package, on the same weights."""
    from tgate import TgateSDLoader

    gate = gate_of(arguments)
    ours, theirs = twins(pipe)
    cachekit.apply(ours, f"tgate:m={gate}")
    published = TgateSDLoader(theirs)
    schedule = {"gate_step": gate, "sp_interval": 1, "fi_interval": 1, "warm_up": 0}
    return lambda: ours(**arguments), lambda: published.tgate(**arguments, **schedule)


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


def cached_and_plain(pipe: Any, arguments: dict[str, Any]) -> tuple[Run, Run]:
    """Make a run with TGATE, and the plain run."""
    cached, plain = twins(pipe)
    cachekit.apply(cached, f"tgate:m={gate_of(arguments)}")
    return lambda: cached(**arguments), lambda: plain(**arguments)


def by_hand(pipe: Any, arguments: dict[str, Any]) -> tuple[Run, Run]:
    """Make a minimal sampling loop with TGATE's schedule, and the same loop without it.

    From the gate on each cross-attention returns a constant and half of the batch runs; nothing is decided, counted or
    checked.
    """
    unet, scheduler = twins(pipe)[1].unet, pipe.scheduler
    attentions = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    side = arguments.get("height", 0) // pipe.vae_scale_factor or unet.config.sample_size
    start = torch.randn(1, unet.config.in_channels, side, side)
    steps, scale = arguments["num_inference_steps"], arguments.get("guidance_scale", 7.5)

    def text() -> torch.Tensor:
        if "prompt" not in arguments:
            return torch.cat([arguments["negative_prompt_embeds"], arguments["prompt_embeds"]])
        caption, empty = pipe.encode_prompt(arguments["prompt"], "cpu", 1, True)
        return torch.cat([empty, caption])

    @torch.no_grad()
    def loop(gate: int) -> None:
        embeddings, latents = text(), start * scheduler.init_noise_sigma
        scheduler.set_timesteps(steps)
        for step, t in enumerate(scheduler.timesteps):
            if step < gate:
                sample = scheduler.scale_model_input(torch.cat([latents, latents]), t)
                last = step == gate - 1 and gate < steps
                handles = [module.register_forward_hook(hold) for module in attentions if last]
                u, c = unet(sample, t, embeddings, return_dict=False)[0].chunk(2)
                output = u + scale * (c - u)
                for handle in handles:
                    handle.remove()
            else:
                sample = scheduler.scale_model_input(latents, t)
                output = unet(sample, t, embeddings[:1], return_dict=False)[0]
            latents = scheduler.step(output, t, latents, return_dict=False)[0]
        for module in attentions:
            vars(module).pop("forward", None)

    return lambda: loop(gate_of(arguments)), lambda: loop(steps)


def hold(module: Any, args: Any, output: torch.Tensor) -> None:
    """Make an attention return the mean of the two halves of this output from now on."""
    u, c = output.chunk(2)
    constant = (u + c) / 2
    module.forward = lambda *args, **kwargs: constant


def deepcache(pipe: Any, arguments: dict[str, Any], branch: int) -> tuple[Run, Run]:
    """Make runs with DeepCache by cachekit and by the published package, on the same weights."""
    from DeepCache import DeepCacheSDHelper

    ours, theirs = twins(pipe)
    cachekit.apply(ours, f"deepcache:interval=3,branch={branch}")
    helper = DeepCacheSDHelper(pipe=theirs)
    helper.set_params(cache_interval=3, cache_branch_id=branch)

    def published() -> None:
        helper.enable()
        theirs(**arguments)
        helper.disable()

    return lambda: ours(**arguments), published


def twins(pipe: Any) -> tuple[Any, Any]:
    """Remove all policies from a pipeline, and copy it with shared weights."""
    cachekit.remove(pipe)
    return pipe, twin(pipe)


if __name__ == "__main__":
    main()
