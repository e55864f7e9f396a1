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
import json, torch, cachekit
from support import tiny

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

POLICY = "pyramid_lite:interval=3"
print(json.dumps({f: [measure(f, [POLICY]), measure(f, [POLICY, "tgate:m=5"])] for f in ("sd", "pixart")}))
"""


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """A function that runs Python with the example, which is installed into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", target, EXAMPLE], check=True)
    path = os.pathsep.join([str(target), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}

    def run(*arguments):
        done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, cwd=target)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_it_is_cached_undone_and_cached_again(plugin):
    measured = json.loads(plugin("-c", USE))
    for family, sites in (("sd", 16), ("pixart", 3)):
        alone, composed = measured[family]
        for found in (alone, composed):
            assert (found["differs"], found["undone"], found["again"]) == (True, True, True)
            # Window 2..7 of 10 steps: kept at 2 and 5, reused at 3, 4, 6 and 7.
            assert (found["kind"], found["targets"]) == ("self_attention", sites)
            assert [found[name] // sites for name in ("computed", "stored", "reused", "missed")] == [4, 2, 4, 0]
        assert composed["macs"] < alone["macs"] < alone["baseline"]


CLI = ("-c", "from cachekit.cli import app; app()")


def test_the_command_line_lists_it(plugin):
    listed = plugin(*CLI, "list")
    assert re.search(r"^  pyramid_lite: .*\n.*\n.*from cachekit-pyramid-lite", listed, re.MULTILINE)
    shown = plugin(*CLI, "show", "pyramid_lite")
    for word in ("interval", "start", "end", "arXiv 2408.12588"):
        assert word in shown


def test_the_demo_measures_it(plugin, tmp_path):
    spec = "pyramid_lite:interval=2+deepcache:interval=2"
    plugin(*CLI, "demo", "--captions", "1", "--steps", "5", "--output", str(tmp_path), "--spec", spec)
    assert "pyramid_lite" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "pictures.png").stat().st_size > 1000
