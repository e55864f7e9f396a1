"""Measure what users wait for: commands without weights, the first image of the app, and the images of a batch.

`python -m benchmarks.waiting` runs commands on published architectures, starts `cachekit app` and draws in Chromium,
and draws files of prompts with one worker and with two, and with two actors of which one is killed. `--fresh` clones
the repository first, and installs it with the extra `app` in a new environment, from which the app is started. Needs
selenium, Chromium and Ray. What isn't measured keeps its figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cachekit.models.demo import heldout_captions
from cachekit.tools.batch.drawing import Job
from cachekit.tools.batch.manifest import Folder
from cachekit.tools.batch.rows import Defaults, read_rows, tasks_of
from cachekit.tools.batch.running import Batch
from cachekit.tools.bench.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results" / "waiting.json"
STEPS, SPEC = 25, "forecast:interval=2"
#: The executor and the number of workers of each batch.
BATCHES = (("process", 1), ("process", 2), ("ray", 2))
#: Commands that load no weights, and the architectures that they are run on.
COMMANDS = {
    "sites": ("sites", "{model}"),
    "plan": ("plan", "forecast:interval=3", "--steps", "28", "--model", "{model}"),
    "estimate": ("estimate", "{model}", "forecast:interval=3", "--steps", "28"),
    "recommend": ("recommend", "{model}"),
}
ARCHITECTURES = ("sdxl", "sd3", "flux", "qwen-image", "wan", "hunyuan-video")
#: Seconds after which the app counts as stuck.
_PATIENCE = 300.0
#: What is waited for, by the names of its seconds.
STAGES = {
    "clone": "`git clone`",
    "install": "`pip install '.[app]'` in a new environment",
    "address": "`cachekit app` until it prints its address",
    "page": "the page with plan and estimate",
    "image": "Draw, until both images and their figures are shown",
}


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="start the app from a fresh clone, installed by pip")
    parser.add_argument("--rounds", type=int, default=3, help="starts of the app and of each command")
    parser.add_argument("--images", type=int, default=48, help="images of each batch")
    parser.add_argument("--only", choices=("commands", "app", "batch"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.exists() else {}
    found["environment"] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processors": os.cpu_count(),
    }
    if options.only in (None, "commands"):
        found["commands"] = [command(name, model, options.rounds) for name in COMMANDS for model in ARCHITECTURES]
    if options.only in (None, "app"):
        found["app"] = app(options.rounds, options.fresh)
        print(found["app"], flush=True)
    if options.only in (None, "batch"):
        found["batches"] = [batch(executor, workers, options.images) for executor, workers in BATCHES]
        print(*found["batches"], sep="\n", flush=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")


# -- commands ----------------------------------------------------------------------------------------------


def command(name: str, model: str, rounds: int) -> dict[str, Any]:
    """Run a command in processes of its own: median seconds, and most bytes of memory."""
    runs = [_used([part.format(model=model) for part in COMMANDS[name]]) for _ in range(rounds)]
    found = {"seconds": median(seconds for seconds, _ in runs), "peak_bytes": max(peak for _, peak in runs)}
    print(name, model, found, flush=True)
    return {"command": name, "model": model, **found}


def _used(arguments: list[str]) -> tuple[float, int]:
    """Wall time of a command, and the most memory that its process has held."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "cachekit", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"cachekit {' '.join(arguments)}: exit code {process.returncode}")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024  # Linux counts in KiB


# -- the app ------------------------------------------------------------------------------------------------


def app(rounds: int, fresh: bool) -> dict[str, Any]:
    """Measure the seconds of each stage until the app's first image: medians of several starts."""
    with tempfile.TemporaryDirectory() as folder:
        python, installed = _installed(Path(folder)) if fresh else (sys.executable, {})
        starts = [_first_image(python, Path(folder)) for _ in range(rounds)]
    medians = {stage: median(start[stage] for start in starts) for stage in starts[0]}
    return {"rounds": rounds, "seconds": {**installed, **medians}}


def _installed(folder: Path) -> tuple[str, dict[str, float]]:
    """Clone and install the repository; the interpreter, and the seconds that both took."""
    clone, python = folder / "cachekit", str(folder / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
    begun = time.perf_counter()
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    cloned = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    subprocess.run([*pip, "-c", str(clone / "constraints.txt"), f"{clone}[app]"], check=True)
    return python, {"clone": cloned - begun, "install": time.perf_counter() - cloned}


def _first_image(python: str, folder: Path) -> dict[str, float]:
    """Start the app and draw in a browser that is there already; the seconds of each stage."""
    is_own = python == sys.executable
    # What this process finds by its path isn't for another environment.
    environment = {name: value for name, value in os.environ.items() if is_own or name != "PYTHONPATH"}
    started: dict[str, Any] = {"cwd": ROOT if is_own else folder, "env": environment, "text": True}
    command = [python, "-m", "cachekit", "app", "demo", "--device", "cpu"]
    with _browser(folder) as driver:
        begun = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, **started) as process:
            try:
                assert process.stdout is not None
                address = process.stdout.readline().split()[1]
                ends = {"address": time.perf_counter()}
                driver.get(address)
                _wait(lambda: "MAC reduction" in _text(driver, "#costs") and _text(driver, "#plan"))
                ends["page"] = time.perf_counter()
                driver.find_element("css selector", "#draw").click()
                _wait(lambda: "PSNR" in _text(driver, "#figures") and _images(driver) >= 2)
                ends["image"] = time.perf_counter()
            finally:
                process.terminate()
    times = [begun, *ends.values()]
    return {stage: times[place + 1] - times[place] for place, stage in enumerate(ends)}


@contextmanager
def _browser(folder: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def _text(driver: Any, selector: str) -> str:
    return str(driver.execute_script(f"return document.querySelector({selector!r})?.innerText ?? ''"))


def _images(driver: Any) -> int:
    """Count the images of the slider that have been loaded."""
    script = "return [...document.querySelectorAll('#slider img')].filter(one => one.naturalWidth).length"
    return int(driver.execute_script(script))


def _wait(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"the app showed nothing in {_PATIENCE:g} seconds")
        time.sleep(0.02)


# -- batches ------------------------------------------------------------------------------------------------


def batch(executor: str, workers: int, images: int) -> dict[str, Any]:
    """Draw a file of prompts, as `cachekit generate --prompts` does; of actors, one is killed after the first image.

    The time of a batch includes the start of its workers.
    """
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.txt")
        prompts.write_text("\n".join(heldout_captions(images)) + "\n")
        job = Job("demo", device="cpu", threads=1)
        tasks, _ = tasks_of(read_rows(str(prompts)), Defaults(steps=STEPS, specs=(SPEC,)), job.identity)
        made, again = Batch(job, tasks, Folder(Path(folder, "images"))), list[str]()
        for _ in made.run(executor, workers, again.append):
            if executor == "ray" and made.drawn == 1:
                _kill_an_actor()
        found = {"images": images, "seconds": 60 * made.drawn / made.per_minute, "images_per_minute": made.per_minute}
        return {"executor": executor, "workers": workers, **found, "again": len(again), "lost": made.total - made.kept}


def _kill_an_actor() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        if " ".join(child.cmdline()).startswith("ray::_Actor"):
            child.kill()
            return
    raise SystemExit("no actor to kill")


# -- tables -------------------------------------------------------------------------------------------------


def commands() -> str:
    """Table of the seconds of each command without weights, by architecture, and of the memory of the largest."""
    found = {(row["command"], row["model"]): row for row in _stored().get("commands", ())}
    if not found:
        return ""
    rows = [
        [f"`{model}`", *(f"{found[name, model]['seconds']:.1f}" for name in COMMANDS), f"{_peak(found, model):,.0f}"]
        for model in ARCHITECTURES
    ]
    table = markdown(["architecture", *(f"`{name}`" for name in COMMANDS), "most memory, MiB"], rows)
    return f"""Seconds of each command on {_processors()}, from the start of its process to the end, as
`python -m benchmarks.waiting` measures them:

{table}"""


def _peak(found: dict[tuple[str, str], dict[str, Any]], model: str) -> float:
    """Most MiB that any of the commands has held for a model."""
    return float(max(found[name, model]["peak_bytes"] for name in COMMANDS)) / 2**20


def first_image() -> str:
    """Table of the seconds until the app's first image, stage by stage."""
    found = _stored().get("app")
    if not found:
        return ""
    seconds = found["seconds"]
    rows = [[STAGES[stage], f"{seconds[stage]:.1f}"] for stage in STAGES if stage in seconds]
    table = markdown(["what", "seconds"], [*rows, ["all of it", f"{sum(seconds.values()):.1f}"]])
    return f"""Seconds until the first image, of the embedded UNet on {_processors()}, as
`python -m benchmarks.waiting --fresh` measures them: medians of {found["rounds"]} starts, and one installation with the
versions of `constraints.txt`. Repository and packages were at hand, so that downloads are not among them:

{table}"""


def batches() -> str:
    """Table of the images per minute of batches."""
    rows = [
        [
            f"`--executor {row['executor']} --workers {row['workers']}`"
            + (", one killed on the way" if row["again"] else ""),
            *(f"{row[name]:.1f}" for name in ("seconds", "images_per_minute")),
            f"{row['lost']} of {row['images']}",
        ]
        for row in _stored().get("batches", ())
    ]
    if not rows:
        return ""
    table = markdown(["workers", "seconds", "images per minute", "rows lost"], rows)
    return f"""Images per minute of the embedded UNet on {_processors()}, {STEPS} steps with `{SPEC}`, as
`python -m benchmarks.waiting` measures them. The start of the workers counts:

{table}"""


def _processors() -> str:
    return f"{_stored()['environment']['processors']} cores"


def _stored() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


if __name__ == "__main__":
    main()
