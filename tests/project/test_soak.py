"""The soak in small: what `python -m benchmarks.soak` does at length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_nothing_grows_and_no_image_is_lost(tmp_path):
    file = tmp_path / "soak.json"
    sizes = ["--runs", "24", "--ways", "5", "--thread-runs", "2", "--output", str(file)]
    subprocess.run([sys.executable, "-m", "benchmarks.soak", *sizes], cwd=ROOT, capture_output=True, check=True)
    found = json.loads(file.read_text())
    soak = found["soak"]
    assert (soak["runs"], soak["faults"], soak["paused"]) == (24, 5, 4)
    assert (soak["lost"], soak["modules_changed"]) == (0, 0)
    assert soak["tensors_end"] == soak["tensors_start"]
    assert soak["bytes_end"] < 1.1 * soak["bytes_start"]
    assert found["threads"] == {"threads": 2, "runs_each": 2, "lost": 0}
