"""`python -m benchmarks.gates`: found gates beside fixed ones, resumed, and the line that compares them."""

from __future__ import annotations

from importlib import import_module

import pytest

from cachekit.models.demo import heldout_captions
from cachekit.tools.bench import frechet
from cachekit.tools.bench.results import Results, read

gates = import_module("benchmarks.gates")

#: Of a caption that other tests don't use, since statistics of rendered scenes are remembered.
SEED = 77
FIXED, FOUND = ("tgate:m=1", "tgate:m=3"), ("tgate:m=auto,settled=1",)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measure one caption in runs of four steps, and again where nothing is missing."""
    file = gates.path_of("demo", tmp_path_factory.mktemp("gates"))
    with pytest.MonkeyPatch.context() as patch:
        for name, specs in (("FIXED", FIXED), ("FOUND", FOUND), ("OWN", ())):
            patch.setattr(gates, name, specs)
        patch.setattr(frechet, "RENDERED", 2)
        gates.measure("demo", tuple(heldout_captions(1, SEED)), Results(file), steps=4)
        patch.setattr(gates, "Workbench", None)
        gates.measure("demo", tuple(heldout_captions(1, SEED)), Results(file), steps=4)
    return file


def test_each_spec_is_measured_once(measured):
    assert [result.cell.specs[0] for result in read(measured)[0]] == [*FIXED, *FOUND]


def test_the_table_compares_found_gates_with_the_line_through_the_fixed_ones(measured, monkeypatch):
    monkeypatch.setattr(gates, "FIXED", FIXED)
    monkeypatch.setattr(gates, "FOUND", FOUND)
    (group,) = gates.stored(measured)
    text = gates.table(group)
    assert "demo, DPMSolverMultistepScheduler, 4 steps" in text
    low, found, high = sorted(group.rows, key=lambda row: row.macs)
    assert (low.label, found.label, high.label) == (FIXED[0], *FOUND, FIXED[1])
    share = (found.macs - low.macs) / (high.macs - low.macs)
    lead = found.psnr - (low.psnr + share * (high.psnr - low.psnr))
    where = "above" if lead >= 0 else "below"
    assert f"- {found.label}: PSNR {abs(lead):.1f} dB {where} the fixed gates at equal MACs\n" in text
