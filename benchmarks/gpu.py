"""Measure policies, published packages and other caches on large models with random weights, on a GPU.

`python -m benchmarks.gpu` needs no network. Rows are measured in the order of their importance within `--seconds`; each
is written to `--output` at once, and a row that is there is not measured again. `--device cpu --tiny` tries all of it
at small sizes. `--estimate` adds to the results what `cachekit estimate` counts for each row, which needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import json
import platform
import signal
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch

import cachekit
from cachekit.errors import first_line
from cachekit.registry.notices import silent_log
from cachekit.tools.bench.cells import Method

from .gpu_checks import CHECKS, Compiled, check
from .gpu_models import Model, known_of, steps_of
from .gpu_rows import CHECK, COMPILED, Row, is_planned, measure, rows, specs

OUTPUT = Path(__file__).parent / "results" / "gpu.json"
#: Budget unless another is given: with `END` eight minutes.
SECONDS = 390
#: Seconds that a row may take before it is given up, and how far it may exceed the budget.
LIMIT, COMPILE_LIMIT, EXCESS = 60, 150, 20
#: Seconds beyond the budget at which the process ends whatever it does, in a call that can't be interrupted too.
END = 90
#: Seconds that a row takes by expectation, where its model was not run yet, or where it compiles.
UNKNOWN, COMPILING = 8.0, 40.0
#: Compiled rows that need code of their own.
_RECOMPILED = ("uncached", "taylorseer", "tgate")
_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "cache-dit", "DeepCache", "tgate", "triton")


def main(given: list[str] | None = None) -> None:
    """Parse the command line, measure what fits, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="budget; rows that no longer fit are listed")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the command")
    parser.add_argument("--only", default="", help="rows whose names contain this text")
    parser.add_argument("--retry", action="store_true", help="measure rows again that failed")
    parser.add_argument("--estimate", action="store_true", help="only add estimates to the results, without a GPU")
    options = parser.parse_args(given)
    results = Results(options.output, options.tiny)
    with warnings.catch_warnings(), silent_log():
        warnings.simplefilter("ignore")
        if options.estimate:
            add_estimates(results)
            return
        if options.device != "cpu" and not torch.cuda.is_available():
            raise SystemExit(f"device {options.device!r}: torch finds no GPU here; give --device cpu --tiny to try")
        wanted = [row for row in rows(options.tiny, tuple(CHECKS)) if options.only in row.key]
        faulthandler.dump_traceback_later(options.seconds + END, exit=True)
        try:
            deadline = time.monotonic() + options.seconds
            Bench(options.device, options.tiny, deadline, results).measure(wanted, options.retry)
        finally:
            faulthandler.cancel_dump_traceback_later()


class Results:
    """The rows measured so far, in a JSON file that is written after each."""

    def __init__(self, output: Path, tiny: bool) -> None:
        """Read the file, if there is one; refuse one of the other size of models."""
        self._output = output
        held: dict[str, Any] = {"tiny": tiny, "versions": {}, "rows": {}, "not_run": []}
        if output.exists():
            held = json.loads(output.read_text())
        if held["tiny"] != tiny:
            raise SystemExit(
                f"{output}: has rows of {'small' if held['tiny'] else 'true'} models; give another --output"
            )
        self.tiny = tiny
        #: Versions of packages, by device.
        self.versions: dict[str, dict[str, str]] = held["versions"]
        self.rows: dict[str, dict[str, Any]] = held["rows"]
        self.not_run: list[str] = held["not_run"]

    def add(self, row: Row, found: dict[str, Any]) -> None:
        """Add a row and write the file."""
        self.rows[row.key] = {"model": row.model, "kind": row.kind, "text": row.text, **found}
        self.write()

    def write(self) -> None:
        """Write the file at once or not at all."""
        self._output.parent.mkdir(parents=True, exist_ok=True)
        names = ("tiny", "versions", "rows", "not_run")
        text = json.dumps({name: getattr(self, name) for name in names}, indent=1)
        unfinished = self._output.with_suffix(".part")
        unfinished.write_text(text + "\n")
        unfinished.replace(self._output)


class Bench:
    """Measures rows until a deadline."""

    def __init__(self, device: str, tiny: bool, deadline: float, results: Results) -> None:
        """Measure on `device`; models are built when a row needs them, and stay."""
        self._device, self._tiny, self._deadline, self._results = device, tiny, deadline, results
        self._models: dict[str, Model] = {}
        self._compiled = Compiled("aot_eager" if device == "cpu" else "inductor")
        self._name = (platform.processor() or platform.machine()) if device == "cpu" else torch.cuda.get_device_name()
        results.versions[self._name] = versions()

    def measure(self, wanted: list[Row], retry: bool) -> None:
        """Measure the rows that are not in the results, and list those that no longer fit."""
        held = self._results.rows
        left = [row for row in wanted if row.key not in held or (retry and "error" in held[row.key])]
        self._results.not_run = []
        for row in left:
            if time.monotonic() + self._expected(row) > self._deadline:
                self._results.not_run.append(row.key)
                continue
            begun = time.monotonic()
            found = self._attempt(row)
            if found.get("error", "").startswith("TimeoutError") and time.monotonic() > self._deadline:
                self._results.not_run.append(row.key)  # for want of budget, not by a fault of its own
                continue
            found |= {"took": round(time.monotonic() - begun, 2), "device": self._name}
            self._results.add(row, found)
            print(f"{row.key}: {summary(found)}", flush=True)
        self._results.write()
        for key in self._results.not_run:
            print(f"not run: {key}")

    def _expected(self, row: Row) -> float:
        """Estimate how long a row takes from the uncached run of its model."""
        if self._tiny:
            return 1.0
        if row.kind == CHECK:
            return UNKNOWN
        model = self._models.get(row.model)
        seconds = model.plain_seconds[-1] if model and model.plain_seconds else None
        compiling = COMPILING if row.kind == COMPILED and row.text.partition(":")[0] in _RECOMPILED else 0.0
        return compiling + (UNKNOWN if seconds is None else 2.5 * seconds)

    def _attempt(self, row: Row) -> dict[str, Any]:
        """Measure a row; whatever goes wrong is its result."""
        try:
            left = max(1, int(self._deadline - time.monotonic())) + EXCESS
            with limited(min(left, COMPILE_LIMIT if row.kind == COMPILED else LIMIT)):
                if row.kind == CHECK:
                    return check(row.text, self._model)
                if row.kind == COMPILED:
                    return self._compiled.measure(row, self._model(row.model))
                return measure(row, self._model(row.model))
        except Exception as error:  # noqa: BLE001 - one row that fails must not cost the others
            return {"error": f"{type(error).__name__}: {first_line(error)}"}
        finally:
            gc.collect()
            if self._device != "cpu":
                with contextlib.suppress(RuntimeError):  # after a fault of the GPU
                    torch.cuda.empty_cache()

    def _model(self, name: str) -> Model:
        if name not in self._models:
            begun = time.monotonic()
            self._models[name] = Model(name, self._device, self._tiny)
            print(f"built {name} in {time.monotonic() - begun:.1f} s", flush=True)
        return self._models[name]


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in the block after so many seconds."""

    def give_up(signum: int, frame: Any) -> None:
        raise TimeoutError(f"gave up after {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def versions() -> dict[str, str]:
    """Find the versions of the packages that are installed."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def summary(found: dict[str, Any]) -> str:
    """Describe a result in a line."""
    if "error" in found:
        return str(found["error"])
    if "detail" in found:
        return f"passed: {found['detail']}"
    macs = f", MACs {found['mac_reduction']:.2f}x less" if found["mac_reduction"] else ""
    equal = ", equal" if found["equal"] else f", differs by {found['difference']:.2e}"
    finite = "" if found["finite"] else ", NOT FINITE"
    return f"{median(found['seconds']):.3f} s, {found['speedup']:.3f}x{macs}{equal}{finite}"


def add_estimates(results: Results) -> None:
    """Count each row of cachekit whose actions are planned, on the meta device."""
    for key, found in results.rows.items():
        text = found["text"]
        if found["kind"] != Method.CACHEKIT.value or "error" in found or not is_planned(text):
            continue
        known = known_of(found["model"], results.tiny)
        try:
            cost = cachekit.estimate(
                known.build(),
                specs(text),
                num_inference_steps=steps_of(found["model"], results.tiny),
                inputs=known.inputs(2 if known.guided else 1),
                guided=known.guided,
            )
        except cachekit.CachekitError as error:
            found["estimate_error"] = first_line(error)
        else:
            attention = (cost.baseline_attention_macs, cost.attention_macs)
            found["estimated_mac_reduction"] = cost.mac_reduction
            found["estimated_with_attention"] = (cost.baseline_macs + attention[0]) / (cost.macs + attention[1])
            found["estimated_kept_bytes"] = cost.cache_bytes
        print(f"{key}: {found.get('estimated_mac_reduction', found.get('estimate_error'))}", flush=True)
    results.write()


if __name__ == "__main__":
    main()
