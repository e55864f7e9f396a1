"""`cachekit estimate`: the figures of `cachekit.estimate` as tables and as data, and errors of one line."""

from __future__ import annotations

import functools
import json

import pytest
from support import commands, tiny

import cachekit
from cachekit.amounts import macs

SPECS = ["tgate:m=3", "deepcache:interval=2"]


run = functools.partial(commands.run, "estimate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return commands.save_without_weights(tmp_path_factory.mktemp("sd"))


def lines(text, *words):
    return [line for line in text.splitlines() if all(word in line for word in words)]


def test_the_tables_show_what_the_library_says(folder, tmp_path):
    file = tmp_path / "estimate.json"
    result = run(folder, *SPECS, "--steps", 6, "--json", file)
    assert result.exit_code == 0, result.output
    found = cachekit.estimate(tiny.sd(), SPECS, num_inference_steps=6)
    data = json.loads(file.read_text())
    for name in ("macs", "baseline_macs", "attention_macs", "baseline_attention_macs", "params", "baseline_params"):
        assert data[name] == getattr(found, name) > 0
        assert (f"{data[name]:,}" if "params" in name else macs(data[name])) in result.stdout
    assert data["mac_reduction"] == found.mac_reduction
    assert f"{found.mac_reduction:.2f}x" in result.stdout
    assert [step["macs"] for step in data["steps"]] == [step.macs for step in found.steps]
    assert (data["specs"], data["model"]) == (SPECS, str(folder))


def test_equal_steps_that_follow_each_other_share_a_line(folder):
    result = run(folder, "--steps", 7)
    assert len(lines(result.stdout, "0-6")) == 1
    gate = run(folder, "tgate:m=3", "--steps", 7).stdout
    assert len(lines(gate, "3-6", " 1 ")) == 1


def test_an_architecture_needs_no_files_and_takes_a_size():
    small = run("sd15", "--steps", 2, "--height", 64, "--width", 128)
    assert small.exit_code == 0, small.output
    found = cachekit.estimate("sd15", num_inference_steps=2, height=64, width=128)
    assert macs(found.macs) in small.stdout
    assert macs(found.attention_macs) in small.stdout


def test_the_pipeline_says_how_many_pixels_a_latent_is(folder, tmp_path):
    sizes = {"own": [], "same": ["--height", 32, "--width", 32], "larger": ["--height", 64, "--width", 32]}
    counted = {}
    for name, size in sizes.items():
        assert run(folder, "--steps", 1, *size, "--json", tmp_path / name).exit_code == 0
        counted[name] = json.loads((tmp_path / name).read_text())["macs"]
    assert counted["own"] == counted["same"] < counted["larger"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sdlx"], "unknown model 'sdlx' (did you mean 'sdxl'?)"),
        (["./no-such-folder"], "there is no such folder"),
        (["sd15", "tgat:m=2"], "did you mean 'tgate'?"),
        (["sd15", "tgate", "tgate:m=3"], "given twice"),
        (["sd15", "--height", "100"], "give a multiple of 16"),
        (["sd15", "--json", "no/such/folder.json"], "cannot write 'no/such/folder.json'"),
    ],
)
def test_an_error_is_one_line(arguments, said):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
