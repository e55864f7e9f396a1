"""`python -m benchmarks.frontier`: blocks of captions, resumed one by one, and their tables."""

from __future__ import annotations

from importlib import import_module

import pytest

from cachekit.models.demo import heldout_captions
from cachekit.tools.bench.cells import Method, Setting
from cachekit.tools.bench.results import Results, read

frontier = import_module("benchmarks.frontier")

DPM = "DPMSolverMultistepScheduler"
SPECS = ("forecast:interval=2", "forecast:interval=2,order=0", "forecast:intervall=2")


def measure(file, seed, specs=SPECS):
    captions = frontier.fresh_captions(2)[seed : seed + 1]
    setting = Setting(model="demo", captions=captions, device="cpu", threads=1, guidance=3.5, pictures=0)
    frontier.measure(setting, DPM, specs, seed, Results(file))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measure two blocks of a caption each, in runs of five steps."""
    file = tmp_path_factory.mktemp("frontier") / "frontier-demo.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frontier, "STEPS", 5)
        measure(file, 0)
        measure(file, 1)
    return file


def test_captions_are_fresh():
    found = frontier.fresh_captions(96)
    assert len(set(found)) == 96
    assert found[:24] == frontier.fresh_captions(24)
    assert not set(found) & {caption for seed in range(100) for caption in heldout_captions(64, seed)}


def test_each_block_has_forecasts_and_plain_steps_with_every_spacing(measured):
    results = read(measured)[0]
    for seed in (0, 1):
        block = [result for result in results if result.cell.seed == frontier.NOISE + seed]
        cached = [result.cell.specs for result in block if result.cell.method is Method.CACHEKIT]
        plain = [result.cell.spacing for result in block if result.cell.method is Method.PLAIN]
        assert cached == [(spec,) for spec in SPECS[:2]]
        assert plain == ["", "lu_lambdas", "karras", "full_steps:forecast:interval=2"]
        assert {result.cell.steps for result in block if result.cell.method is Method.PLAIN} == {3}


def test_a_policy_that_is_not_there_is_reported(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frontier, "STEPS", 5)
    measure(tmp_path / "r.jsonl", 0, SPECS[2:])
    assert "left out: spec 'forecast:intervall=2': unknown key 'intervall'" in capsys.readouterr().out
    assert read(tmp_path / "r.jsonl")[0] == []


def test_what_the_file_holds_is_not_measured_again(measured, monkeypatch, capsys):
    monkeypatch.setattr(frontier, "STEPS", 5)
    before = measured.read_bytes()
    lines = before.splitlines(keepends=True)
    measured.write_bytes(b"".join(lines[:-1]))
    measure(measured, 1)
    assert "1 cells" in capsys.readouterr().out
    assert len(measured.read_bytes().splitlines()) == len(lines)
    assert measured.read_bytes().startswith(b"".join(lines[:-1]))
    measured.write_bytes(before)


def test_blocks_are_one_table(measured):
    (group,) = frontier.stored(measured)
    assert {len(row.samples) for row in group.rows} == {2}
    text = frontier.table(group)
    assert text.startswith("**demo, DPMSolverMultistepScheduler, guidance 3.5**\n")
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    names = ["configuration", "---", "uncached, 5 steps", *SPECS[:2]]
    assert [row.strip("| ").partition(" | ")[0] for row in rows] == names
    assert all("(n=2)" in row for row in rows[2:])
    best = group.best_plain(3)
    for row in rows[3:]:
        assert f"| 3{f', {best.cell.spelled}' if best.cell.spacing else ''}: {best.psnr:.1f} dB" in row
        assert row.endswith(f"| {best.speedup:.2f}x |")
