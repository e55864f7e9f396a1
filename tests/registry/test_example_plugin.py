"""The example plugin works like any third-party one: installed from its folder, found, composed, measured, undone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cachekit-pyramid-lite"

USE = """
import importlib, json, sys, torch, cachekit
from support import commands, tiny

def measure(family, specs):
    torch.manual_seed(0)
    pipe = getattr(tiny, family)()
    call = {"steps": 10, "batch": 2}
    plain = tiny.latents(pipe, **call)
    with cachekit.apply(pipe, specs) as attachment:
        cached = tiny.latents(pipe, **call)
        report = attachment.report()
    undone = tiny.latents(pipe, **call)
    with cachekit.apply(pipe, specs[::-1]):
        again = tiny.latents(pipe, **call)
    (count,) = [count for count in report.counts if count.policy.startswith("pyramid_lite")]
    same = {"differs": not torch.equal(cached, plain), "undone": torch.equal(undone, plain)}
    same["again"] = torch.equal(again, cached)
    return {**same, **vars(count), "macs": report.macs, "baseline": report.baseline_macs}

torch.set_num_threads(1)
POLICY = "pyramid_lite:interval=3"
found = {f: [measure(f, [POLICY]), measure(f, [POLICY, "tgate:m=5"])] for f in ("small", "pixart")}
found["list"], found["show"] = commands.printed("list"), commands.printed("show", "pyramid_lite")
demo = importlib.import_module("cachekit.cli.demo")
demo.SPECS = demo.SPECS[:1]  # beside one of those that the demo compares anyway
spec = "pyramid_lite:interval=2+deepcache:interval=2"
commands.printed("demo", "--captions", 1, "--steps", 5, "--output", sys.argv[1], "--spec", spec)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder that the demo with the example is written to."""
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def found(demo, tmp_path_factory):
    """What one process, with the example installed into a folder of its own, measures and prints."""
    target = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, EXAMPLE], check=True)
    path = os.pathsep.join([str(target), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", USE, demo], env=env, capture_output=True, text=True, cwd=target)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_it_is_cached_undone_and_cached_again(found):
    for family, sites in (("small", 6), ("pixart", 3)):
        alone, composed = found[family]
        for one in (alone, composed):
            assert (one["differs"], one["undone"], one["again"]) == (True, True, True)
            # Window 2..7 of 10 steps: kept at 2 and 5, reused at 3, 4, 6 and 7.
            assert (one["kind"], one["targets"]) == ("self_attention", sites)
            assert [one[name] // sites for name in ("computed", "stored", "reused", "missed")] == [4, 2, 4, 0]
        assert composed["macs"] < alone["macs"] < alone["baseline"]


def test_the_command_line_lists_it(found):
    assert re.search(r"^  pyramid_lite: .*\n.*\n.*from cachekit-pyramid-lite", found["list"], re.MULTILINE)
    for word in ("interval", "start", "end", "arXiv 2408.12588"):
        assert word in found["show"]


def test_the_demo_measures_it(found, demo):
    assert "pyramid_lite" in (demo / "table.md").read_text()
    assert (demo / "pictures.png").stat().st_size > 1000
