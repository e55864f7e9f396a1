"""`python -m benchmarks.gpu` at small sizes on the CPU: what it measures, writes, resumes and skips."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu, gpu_tables
from benchmarks.gpu_rows import rows

FORECAST = "pixart-alpha | cachekit | forecast:interval=3"
GATES = ("pixart-alpha | cachekit | tgate:m=3", "pixart-alpha | published | tgate:m=3")
COMPILED, PEER = "flux | compiled | forecast:interval=3", "flux | diffusers | FirstBlockCache:threshold=1e9"
LIMITED = "all | check | max_cache_bytes holds"
UNMEASURED = "all | check | model offloading changes no bit"


def run(output, *more):
    gpu.main(["--device", "cpu", "--tiny", "--output", str(output), *more])
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    for row in (FORECAST, *GATES, UNMEASURED, "pixart-alpha | plain", COMPILED, PEER, LIMITED):
        run(output, "--only", row)
    return output


def test_a_row_has_its_time_beside_the_uncached_one_and_its_macs(output):
    found = json.loads(output.read_text())["rows"][FORECAST]
    assert len(found["seconds"]) == len(found["uncached_seconds"]) == 3
    assert (found["mac_reduction"], found["equal"], found["finite"]) == (2.0, False, True)


def test_the_published_package_is_as_far_from_the_uncached_run(output):
    own, theirs = (json.loads(output.read_text())["rows"][row] for row in GATES)
    assert (own["difference"], own["macs"]) == (theirs["difference"], theirs["macs"])
    assert own["difference"] > 0


def test_compiled_rows_other_caches_and_checks_are_measured(output):
    compiled, peer, limited = (json.loads(output.read_text())["rows"][row] for row in (COMPILED, PEER, LIMITED))
    assert (compiled["finite"], compiled["equal"]) == (True, False)
    assert (peer["finite"], peer["equal"]) == (True, False)
    assert peer["mac_reduction"] > 2
    assert "kept at a limit of" in limited["detail"]


def test_a_row_that_fails_gives_its_reason_and_is_tried_again_on_request(output, monkeypatch):
    assert json.loads(output.read_text())["rows"][UNMEASURED]["error"] == "FailedCheckError: needs an accelerator"
    monkeypatch.setitem(gpu.CHECKS, "model offloading changes no bit", lambda models: "done")
    monkeypatch.setattr("benchmarks.gpu_checks.CHECKS", gpu.CHECKS)
    assert "error" in run(output, "--only", UNMEASURED)["rows"][UNMEASURED]
    assert run(output, "--only", UNMEASURED, "--retry")["rows"][UNMEASURED]["detail"] == "done"


def test_a_row_that_is_there_is_not_measured_again(output):
    before = json.loads(output.read_text())["rows"][FORECAST]
    assert run(output, "--only", FORECAST)["rows"][FORECAST] == before


def test_what_no_longer_fits_is_listed(tmp_path):
    found = run(tmp_path / "gpu.json", "--seconds", "0")
    assert not found["rows"]
    assert found["not_run"] == [row.key for row in rows(True, tuple(gpu.CHECKS))]


def test_small_and_true_models_do_not_share_a_file(output):
    with pytest.raises(SystemExit, match="has rows of small models; give another --output"):
        gpu.main(["--device", "cpu", "--output", str(output), "--estimate"])


def test_estimates_equal_what_was_counted_and_both_are_in_the_table(output, monkeypatch):
    found = run(output, "--estimate")["rows"][FORECAST]
    assert found["estimated_mac_reduction"] == pytest.approx(found["mac_reduction"])
    monkeypatch.setattr(gpu_tables, "OUTPUT", output)
    table = gpu_tables.table()
    (row,) = [line for line in table.splitlines() if line.startswith("| cachekit `forecast:interval=3`")]
    assert row.count("2.000") == 2
    left = table.partition("rows of the script are not measured yet")[2]
    assert "published package of `tgate:m=10`" in left
    assert "cachekit `forecast:interval=3`" not in left.partition("pixart-alpha: ")[2].partition("\n")[0]
