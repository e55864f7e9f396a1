"""`cachekit bench paper`: every published figure is rebuilt, or comes with the command that measures it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import diffusers
import numpy as np
import pytest
from PIL import Image
from support import commands, networks

from cachekit.models.architectures import architecture
from cachekit.models.demo import heldout_captions, scenes
from cachekit.registry.catalog import installed
from cachekit.tools.bench.cells import expand
from cachekit.tools.bench.paper import measurable, tables

KEPT = json.loads((Path(__file__).parents[3] / "benchmarks" / "results" / "paper.json").read_text())
PRINTED = [row for part in ("rows", "cair", "scaling") for row in tables()[part]]


def tolerance(row):
    """Compute how far from the printed figure an exact count may be: the papers round, and count SD a little high."""
    if row["table"] == "10":
        return 0.0005 + 5e-4 * row["paper"]
    # CAIR prints two places, the others three.
    rounding = 0.005 if row["table"].startswith("CAIR") else 0
    return rounding + (5e-4 if row["name"].startswith("sd1") or row["name"].startswith("sd2") else 1e-4) * row["paper"]


def test_what_is_kept_is_all_that_needs_no_weights():
    assert [(row["table"], row["paper"]) for row in KEPT] == [(str(row["table"]), row["macs_T"]) for row in PRINTED]


@pytest.mark.parametrize("row", KEPT, ids=lambda row: f"{row['table']}-{row['name']}")
def test_each_kept_figure_is_that_of_the_paper(row):
    assert row["ours"] == pytest.approx(row["paper"], abs=tolerance(row))
    assert row["ratio"] == row["ours"] / row["paper"]
    if row["params"] is not None:
        assert row["params"] / 1e6 == pytest.approx(row["paper_params"], rel=2e-3)


def test_the_command_rebuilds_what_is_kept_and_prints_how_fids_are_measured():
    text = commands.printed("bench", "paper", "lcm-pixart")
    kept = [row for row in KEPT if row["name"].startswith("lcm-pixart")]
    assert len(kept) == 3
    for row in kept:
        line = f"{row['name']:80}  {row['paper']:9.3f}  {row['ours']:9.3f}  {row['ratio']:7.5f}"
        assert f"{line}  {row['paper_params']:9.3f}  {row['params'] / 1e6:9.3f}\n" in text
    assert "Not reproducible here" in text
    for found in measurable(["lcm-pixart"]):
        assert f"FID {found.paper:.3f}" in text
        assert all(command in text for command in found.commands)
    assert "sdxl" not in text


def test_a_model_without_tables_is_refused():
    result = commands.run("bench", "paper", "sdlx")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "did you mean 'sdxl'?" in result.stderr


# -- the commands for FIDs --------------------------------------------------------------------------------


def test_every_published_fid_has_its_command():
    rows = [row for part in ("quality", "rows", "cair") for row in tables()[part]]
    assert len(rows) > 70
    assert [(found.table, found.paper) for found in measurable()] == [(str(row["table"]), row["fid"]) for row in rows]


def test_every_command_is_one_that_bench_takes():
    for found in measurable():
        name, given = commands.parsed(found.commands[-1])
        assert name == "bench coco"
        assert len(given["models"]) == 1
        expand(given["spec"] or [], installed())
        for name in given["scheduler"] or []:
            assert f"{name}Scheduler" in {kind.__name__ for kind in diffusers.EulerDiscreteScheduler().compatibles}
        assert str(given["steps"][0]) in found.name


def test_a_command_that_prepares_a_model_is_python():
    prepared = {found.commands[0] for found in measurable() if len(found.commands) > 1}
    assert len(prepared) == 1
    for command in prepared:
        python, flag, code = shlex.split(command)
        assert (python, flag) == ("python", "-c")
        compile(code, "prepare", "exec")
        for name in ("LCMScheduler", "StableDiffusionXLPipeline", "UNet2DConditionModel"):
            assert name in code
            assert hasattr(diffusers, name)


def test_a_command_measures_what_it_says_on_data_that_is_at_hand(tmp_path, monkeypatch):
    """Run one as it is printed, but for the model, its precision and steps, on as many captions as there are here."""
    monkeypatch.chdir(tmp_path)
    captions = heldout_captions(3, seed=2)
    images = [{"id": place, "file_name": f"{place}.jpg"} for place in range(3)]
    rows = [{"id": place, "image_id": place, "caption": text} for place, text in enumerate(captions)]
    Path("captions_val2014.json").write_text(json.dumps({"images": images, "annotations": rows}))
    Path("val2014").mkdir()
    for place, text in enumerate(captions):
        rendered = scenes.render(scenes.parse(text), np.random.default_rng(place))
        Image.fromarray((rendered * 255).astype(np.uint8)).save(f"val2014/{place}.jpg")
    networks.features("inception-2015-12-05.pt")
    (row,) = (found for found in measurable(["sd15"]) if found.table == "5" and found.name.endswith("tgate:m=5"))
    words = shlex.split(row.commands[-1])[4:]
    for name, value in {"--dtype": "float32", "--steps": "6"}.items():
        words[words.index(name) + 1] = value
    text = commands.printed("bench", "coco", "demo", *words)
    assert "tgate:m=5" in text
    lines = [json.loads(line) for line in Path("bench-coco/scores.jsonl").read_text().splitlines()]
    assert {tuple(line["drawing"]["specs"]) for line in lines} == {(), ("tgate:m=5",)}
    assert all(line["scores"]["fid"] > 0 and line["images"] == 3 for line in lines)
    assert {line["drawing"]["scheduler"] for line in lines} == {"DPMSolverMultistepScheduler"}


def test_tables_name_known_architectures():
    for row in PRINTED:
        assert architecture(row["model"]).name == row["model"]
