"""`cachekit recommend`: what it prints can be pasted, its costs are the estimate's, errors are one line."""

from __future__ import annotations

import json
import re

import pytest
from support import commands, tiny
from support.commands import printed, run

import cachekit
from cachekit.interface.presets import Preset, shipped
from cachekit.tools.tuning.recommend import LEVELS, recommend


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny PixArt pipeline, of no known architecture, as configs alone."""
    made = tmp_path_factory.mktemp("pixart")
    tiny.pixart().save_pretrained(made)
    for weights in made.rglob("*.safetensors"):
        weights.unlink()
    return made


def pasted(text):
    return [json.loads(found) for found in re.findall(r"cachekit\.apply\(pipe, (.*)\)$", text, re.MULTILINE)]


@pytest.fixture(scope="module")
def found(folder):
    return recommend(str(folder), steps=20)


def test_the_lines_for_an_embedded_model_run_as_they_are():
    found = recommend("demo")
    assert [line.level for line in found.lines] == [*LEVELS]
    assert all(not line.first for line in found.lines)
    assert {one.name for one in found.settings} >= {"demo-calibrated-3", "demo-calibrated-5"}
    pipe = cachekit.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for line in found.lines[1:]:
        with cachekit.apply(pipe, line.specs) as attachment:
            pipe("a red circle", num_inference_steps=found.steps, guidance_scale=3.5, output_type="latent")
            report = attachment.report()
            assert report.baseline_macs / report.macs == pytest.approx(line.costs.mac_reduction)


def test_a_calibration_that_ships_is_for_some_scales_of_guidance():
    assert recommend("demo", guidance=7.5).lines[0].specs == ["calibrated:interval=2"]
    assert recommend("demo", guidance=10).lines[0].first.endswith("--guidance 10 --output calibration-2.json")
    assert recommend("demo", guidance=1).lines[-1].first.endswith("--guidance 1 --output calibration-4.json")


def test_costs_are_those_of_the_estimate(found):
    careful, _, bold = found.lines
    cost = cachekit.estimate(tiny.pixart(), careful.specs, num_inference_steps=20)
    assert (careful.costs.mac_reduction, careful.costs.cache_bytes) == (cost.mac_reduction, cost.cache_bytes)
    assert careful.costs.mac_reduction < bold.costs.mac_reduction


def test_weights_that_have_to_be_made_first_come_with_their_command(found):
    bold = found.lines[-1]
    assert "file=calibration-4.json" in bold.code
    command, arguments = commands.parsed(bold.first)
    assert (command, arguments["prompts"]) == ("calibrate", "prompts.txt")
    assert (arguments["spec"], arguments["steps"]) == ("calibrated:interval=4", 20)


def test_a_folder_of_an_unknown_architecture_has_the_presets_of_its_class(folder, tmp_path):
    file = tmp_path / "found.json"
    text = printed("recommend", folder, "--json", file)
    data = json.loads(file.read_text())
    assert (data["architecture"], data["denoiser"]) == (None, "PixArtTransformer2DModel")
    assert data["scheduler"] == type(tiny.pixart().scheduler).__name__
    assert {one["published_for"] for one in data["settings"]} == {"pixart-alpha", "pixart-sigma", "lcm-pixart"}
    assert "cross_attention x" in text
    assert len(pasted(text)) == len(LEVELS)
    for spec in pasted(text)[:2]:
        cachekit.apply(tiny.pixart(), spec).remove()


def test_a_run_of_few_steps_gets_what_is_published_for_such_runs(folder):
    found = recommend(str(folder), steps=4)
    presets = {f'cachekit.apply(pipe, "preset:lcm-pixart-tgate-{m}")' for m in (1, 2)}
    assert [line.code for line in found.lines] == sorted(presets, reverse=True)
    assert [line.level for line in found.lines] == ["careful", "balanced"]
    assert found.lines[0].costs.mac_reduction < found.lines[1].costs.mac_reduction


def test_without_anything_published_for_few_steps_there_are_no_lines():
    found = recommend("demo-flow", steps=4)
    assert found.lines == []
    assert "take fewer steps instead" in found.note


def test_an_embedded_model_takes_no_settings_of_other_weights():
    found = recommend("demo-lcm")
    assert (found.settings, found.lines) == ([], [])
    assert "take fewer steps instead" in found.note


def test_where_even_the_best_saves_too_little_there_are_no_lines():
    found = recommend("lcm-sdxl")
    assert len(found.settings) == 2
    assert found.lines == []
    assert "the best setting saves 1.07x, less than 1.1x; take fewer steps instead" in found.note


def test_one_line_alone_says_why(folder, monkeypatch):
    name = "lcm-pixart-tgate-1"
    monkeypatch.setattr("cachekit.tools.tuning.recommend.presets_for", lambda _: {name: Preset.load(shipped()[name])})
    found = recommend(str(folder), steps=4)
    assert [line.level for line in found.lines] == ["careful"]
    assert found.note == "one line alone: no other setting for 4 steps saves more"


def test_a_bold_line_saves_more_than_the_balanced_one():
    careful, balanced, bold = recommend("flux").lines
    assert balanced.code == 'cachekit.apply(pipe, "preset:flux-magcache")'
    assert "calibrated:interval=5" in bold.code
    assert careful.costs.mac_reduction < balanced.costs.mac_reduction < bold.costs.mac_reduction


def test_where_lines_without_weights_miss_weights_come_first():
    plain, bent = (recommend("pixart-alpha", steps=40, guidance=scale) for scale in (3.5, 7.5))
    assert plain.scheduler == "DPMSolverMultistepScheduler"
    assert plain.lines[0].specs == ["forecast:interval=2"]
    assert [line.specs for line in bent.lines] == [
        [f"calibrated:interval={interval},file=calibration-{interval}.json"] for interval in (2, 3, 4)
    ]
    for interval, line in zip((2, 3, 4), bent.lines):
        _, arguments = commands.parsed(line.first)
        assert (arguments["steps"], arguments["guidance"]) == (40, "7.5")
        assert str(arguments["output"]) == f"calibration-{interval}.json"
    assert recommend("pixart-alpha", guidance=1.0).guidance == "no guidance"


def test_a_published_setting_is_priced_in_a_run_of_the_steps_asked_for():
    published, asked = recommend("sdxl", steps=25), recommend("sdxl", steps=50)
    name = '"preset:sdxl-deepcache-3"'
    (balanced,) = [line for line in published.lines if name in line.code]
    (longer,) = [line for line in asked.lines if name in line.code]
    assert (balanced.costs.steps, longer.costs.steps) == (25, 50)
    assert longer.why == f"{balanced.why}, published for 25 steps"
    own = next(one for one in asked.settings if one.name == "sdxl-deepcache-3")
    assert (own.costs.mac_reduction, own.asked_costs) == (balanced.costs.mac_reduction, longer.costs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sdlx"], "did you mean 'sdxl'?"),
        (["./no-such-folder"], "there is no such folder"),
        (["sd15", "--json", "no/such/folder.json"], "cannot write 'no/such/folder.json'"),
    ],
)
def test_an_error_is_one_line(arguments, said):
    result = run("recommend", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr


def test_the_list_has_the_presets_with_their_sources():
    text = printed("list")
    assert "sdxl-tgate-deepcache: TGATE and DeepCache together" in text
    assert "arXiv 2404.02747, version 1, table 7" in text
