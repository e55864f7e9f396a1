"""Presets: their files, what they stand for, and warnings where a pipeline differs from their evidence."""

from __future__ import annotations

import json
import warnings

import pytest
from support import commands, tiny

import cachekit
from cachekit import Preset, PresetError, PresetWarning
from cachekit.interface.presets import Evidence
from cachekit.interface.specs import parse_all
from cachekit.models.architectures import architecture
from cachekit.registry.catalog import installed
from cachekit.upstream.fingerprints import fingerprint

SPECS = ["tgate:m=2", "deepcache:interval=2"]


@pytest.fixture
def pipe():
    return tiny.sd()


def saved(tmp_path, specs=SPECS, **evidence):
    path = tmp_path / "fast.json"
    Preset(specs=specs, evidence=Evidence(**evidence)).save(path)
    return path


def warned(act):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        act()
    return [str(one.message) for one in seen if one.category is PresetWarning]


def test_a_preset_stands_for_its_specs(tmp_path, pipe):
    path = saved(tmp_path)
    assert parse_all(f"preset:{path}", installed()) == parse_all(SPECS, installed())
    with cachekit.apply(pipe, [f"preset:{path}", "null_text:after=3"]) as attachment:
        assert [policy.name for policy in attachment.policies] == ["tgate", "deepcache", "null_text"]


def test_the_folder_of_the_file_can_stand_in_a_spec(tmp_path):
    path = saved(tmp_path, ["calibrated:interval=3,file={folder}/weights.json"])
    (policy,) = parse_all(f"preset:{path}", installed())
    assert policy.file == f"{tmp_path}/weights.json"


@pytest.mark.parametrize("name", ["a,b", "a|b", "a(b", "a)(b"])
def test_a_folder_that_specs_cannot_hold_is_refused_with_the_cure(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    folder.mkdir()
    path = saved(folder, ["calibrated:interval=3,file={folder}/weights.json"])
    with pytest.raises(PresetError) as error:
        parse_all(f"preset:{path}", installed())
    for words in (
        repr(str(path)),
        repr(str(folder)),
        "which specs can't hold; rename it, or name the preset from within",
    ):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.chdir(folder)
    (policy,) = parse_all("preset:fast.json", installed())
    assert policy.file == "./weights.json"


@pytest.mark.parametrize("name", ["a=b", "a;b", "a+b", "a (1)", "a ((1) b)"])
def test_other_folders_stand_in_specs(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    path = saved(folder, ["calibrated:interval=3,file={folder}/weights.json"])
    (policy,) = parse_all(f"preset:{path}", installed())
    assert policy.file == f"{folder}/weights.json"


def test_a_pipeline_that_differs_is_warned_of_with_both_values(tmp_path, pipe):
    own = fingerprint(pipe.unet)
    same = saved(tmp_path, denoiser="UNet2DConditionModel", model=own, scheduler=type(pipe.scheduler).__name__)
    assert warned(lambda: cachekit.apply(pipe, f"preset:{same}").remove()) == []
    other = saved(tmp_path, denoiser="UNet2DConditionModel", model="0" * 16, scheduler="LCMScheduler")
    (line,) = warned(lambda: cachekit.apply(pipe, f"preset:{other}").remove())
    for word in (own, "0" * 16, type(pipe.scheduler).__name__, "LCMScheduler"):
        assert word in line
    assert "\n" not in line


def test_a_published_preset_names_the_model_that_it_is_not_for(tmp_path, pipe):
    (line,) = warned(lambda: cachekit.apply(pipe, "preset:sdxl-deepcache-3").remove())
    assert "the pipeline has an unknown model, not sdxl" in line
    denoiser = architecture("sd15").build()
    (line,) = warned(lambda: cachekit.apply(denoiser, "preset:sdxl-tgate-10").remove())
    assert "the model sd15, not sdxl" in line
    denoiser.register_to_config(sample_size=96)
    assert warned(lambda: cachekit.apply(denoiser, "preset:sd15-tgate-10").remove()) == []
    pixart = architecture("lcm-pixart").build()
    assert warned(lambda: cachekit.apply(pixart, "preset:lcm-pixart-tgate-1").remove()) == []


def test_a_run_that_differs_is_warned_of_with_both_values(tmp_path, pipe):
    def run(steps, scale):
        with cachekit.apply(pipe, f"preset:{path}"):
            pipe(**tiny.arguments(pipe, steps=steps, guidance=scale))

    path = saved(tmp_path, steps=4, guidance=5.0)
    assert warned(lambda: run(4, 5.0)) == []
    (line,) = warned(lambda: run(3, 2.5))
    assert "3 steps, not 4" in line
    assert "guidance scale 2.5, not 5" in line


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not a complete preset file"),
        ('{"version": 9}', "has version 9, this cachekit reads presets of 1"),
        ('{"version": 1, "specs": []}', "specs: List should have at least 1 item"),
        ('{"version": 1, "specs": ["preset:other"]}', "can't be nested"),
        ('{"version": 1, "specs": ["tgate"], "speed": 3}', "speed: Extra inputs are not permitted"),
        (
            '{"version": 1, "specs": ["warp:n=2"], "requires": {"warp": "cachekit-warp"}}',
            "needs the policy 'warp', not installed here; pip install cachekit-warp",
        ),
        (
            '{"version": 1, "specs": ["warp:n=2", "tgate", "weft"], "requires": {"tgate": "cachekit-diffusion"}}',
            "needs the policies 'warp' and 'weft', not installed here; install the plugins that register them",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path, pipe, text, reason):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(PresetError) as error:
        cachekit.apply(pipe, f"preset:{path}")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)
    assert cachekit.attachment(pipe) is None


def test_commands_refuse_a_preset_whose_policies_are_not_installed(tmp_path):
    path = saved(tmp_path, ["warp:n=2"])
    result = commands.run("plan", f"preset:{path}", "--steps", 5)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "needs the policy 'warp', not installed here; install the plugin that registers it" in result.stderr


@pytest.mark.parametrize("spec", ["preset", "preset:", "preset:none-such", "preset:none/such.json"])
def test_a_preset_that_is_not_there_is_one_line(spec):
    with pytest.raises(PresetError) as error:
        parse_all(spec, installed())
    assert str(error.value).count("\n") == 0


def test_a_preset_of_unknown_keys_of_policies_names_the_key(tmp_path):
    with pytest.raises(cachekit.SpecError, match="unknown key 'gate'"):
        parse_all(f"preset:{saved(tmp_path, ['tgate:gate=3'])}", installed())


def test_a_file_is_read_back_as_it_was_written(tmp_path):
    path = saved(tmp_path, steps=25, guidance=3.5, target=["at least 35 dB"])
    assert json.loads(path.read_text())["version"] == 1
    assert Preset.load(path).evidence.target == ["at least 35 dB"]
    with pytest.raises(PresetError, match="cannot write"):
        Preset(specs=SPECS).save(tmp_path / "none" / "fast.json")


def test_a_preset_is_a_line():
    preset = Preset(specs=["tgate:m=5"], evidence={"pipeline": "FluxPipeline", "steps": 25})
    assert repr(preset) == "Preset(specs=['tgate:m=5'], pipeline='FluxPipeline', steps=25)"
    assert str(preset) == "specs=['tgate:m=5'] pipeline='FluxPipeline' steps=25"


def test_a_bare_denoiser_is_compared_by_its_weights(tmp_path, pipe):
    path = saved(tmp_path, denoiser="UNet2DConditionModel", model="0" * 16, pipeline="StableDiffusionPipeline", steps=9)
    (line,) = warned(lambda: cachekit.apply(pipe.unet, f"preset:{path}").remove())
    assert f"the model {fingerprint(pipe.unet)}, not {'0' * 16}" in line
