"""The survey of pipelines: its data fit diffusers, its verdicts are right, and its page shows the results."""

from __future__ import annotations

import inspect
import json
import re
import tempfile
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from support.commands import run
from torch import nn

from cachekit.cli.coverage import COMPOSITIONS, OPTIONS, default_specs
from cachekit.errors import CachekitError
from cachekit.interface.adapter import Layout
from cachekit.interface.specs import parse_all, split_specs
from cachekit.registry.catalog import installed
from cachekit.tools.coverage import trial
from cachekit.tools.coverage.branches import agrees, expected
from cachekit.tools.coverage.building import pipeline_class, pipeline_names
from cachekit.tools.coverage.components import NotBuiltError, make, seed_weights, tokenizer
from cachekit.tools.coverage.facts import class_notes, entries
from cachekit.tools.coverage.page import markdown
from cachekit.tools.coverage.results import (
    FAILS,
    IDLE,
    JOIN,
    LEFT_OUT,
    REFUSED,
    WORKS,
    Coverage,
    Result,
    Sites,
    Trial,
    read,
)
from cachekit.tools.coverage.survey import TrialProcess, survey
from cachekit.tools.coverage.trial import Subject, examine

ROOT = Path(__file__).parents[3]
DATA = ROOT / "docs" / "coverage.json"
#: What the command tries by default, and what is tried here on most pipelines.
ALL = default_specs(sorted(installed().policies))
SPECS = default_specs(["adaptive_guidance", "deepcache", "delta_dit", "null_text", "tgate"])

#: Policies with figures of the model, of which transformers have the places.
MEASURING = ("magcache", "smoothcache")
# pipeline, branches of a step, states under SPECS where they do not depend on the policy alone
FAMILIES = {
    "StableDiffusionPipeline": "uc",
    "StableVideoDiffusionPipeline": "-c",
    "PixArtSigmaPipeline": "uc",
    "DiTPipeline": "c-",
    "FluxPipeline": "c|u",
    "WanPipeline": "c|u",
    "LTXPipeline": "uc",
    "SanaPipeline": "uc",
}


@pytest.mark.parametrize("name", sorted(json.loads((ROOT / "cachekit/tools/coverage/models.json").read_text())))
def test_every_small_configuration_makes_its_class(name):
    if "needs" in class_notes(name) and find_spec(class_notes(name)["needs"]) is None:
        with pytest.raises(NotBuiltError, match="needs "):
            make({"use": name})
        return
    made = make({"use": name})
    # Without torchvision, transformers 5 gives another class for an image processor.
    assert type(made).__name__ in (name.partition("/")[0], f"{name}Pil")
    if isinstance(made, nn.Module):
        assert sum(parameter.numel() for parameter in made.parameters()) < 5_000_000


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry["match"])
def test_every_entry_of_the_facts_is_of_use(entry):
    names = [name for name in pipeline_names() if re.search(entry["match"], name)]
    assert names
    classes = [cls for cls in map(loaded, names) if cls is not None]
    takes = {key for cls in classes for key in inspect.signature(cls.__init__).parameters}
    called = {key for cls in classes for key in inspect.signature(cls.__call__).parameters}
    if classes:
        assert set(entry.get("components", {})) <= takes
        assert set(entry.get("call", {})) <= called
    for cls in classes:
        for method, given in entry.get("before", {}).items():
            assert set(given) <= set(inspect.signature(getattr(cls, method)).parameters)


def loaded(name):
    try:
        return pipeline_class(name)
    except CachekitError:
        return None


def test_every_installed_policy_is_tried_by_default_unless_the_page_gives_a_reason():
    alone = [spec.partition(":")[0] for spec in ALL if spec not in COMPOSITIONS]
    assert sorted([*alone, *LEFT_OUT]) == sorted(installed().policies)
    assert {*OPTIONS} <= {*alone}
    assert {*COMPOSITIONS} < {*SPECS} < {*ALL}


@pytest.mark.parametrize("name", FAMILIES)
def test_policies_work_or_are_refused(name):
    specs = ALL if name == "DiTPipeline" else SPECS
    found = examine(name, specs)
    assert list(found.results) == specs
    assert found.reason == ""
    assert found.branches == FAMILIES[name]
    assert {result.state for result in found.results.values()} <= {WORKS, REFUSED}, found.results
    assert all(found.results[spec].state == WORKS for spec in specs if spec.partition(":")[0] in MEASURING)
    assert found.results["adaptive_guidance:m=3"].state == WORKS
    (sites,) = found.sites.values()
    assert sites.kinds["block"] > 0


# pipelines whose calls are unlike others': a sample of another name, keys and values that one call writes and others
# read, maps of attention that the pipeline itself reads
UNLIKE = {
    "Cosmos3OmniPipeline": {"adaptive_guidance:m=3": WORKS, "delta_dit": WORKS},
    "QwenImage21Pipeline": {"adaptive_guidance:m=3": REFUSED, "delta_dit": WORKS},
    "LEditsPPPipelineStableDiffusion": {"deepcache:interval=2": REFUSED},
}


@pytest.mark.parametrize("name", UNLIKE)
def test_calls_unlike_others_are_understood_or_refused(name):
    found = examine(name, list(UNLIKE[name]))
    assert found.reason == ""
    assert {spec: result.state for spec, result in found.results.items()} == UNLIKE[name], found.results


# how the pipelines that are too large for a test, or need other packages, bring their branches: order, calls apart
LAYOUTS = {
    "OmniGenTransformer2DModel": (("cond", "uncond"), ()),
    "JoyImageEditPlusTransformer3DModel": (("uncond", "cond"), ()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_those_of_the_pipelines(name):
    denoiser = make({"use": name})
    layout = installed().adapter_for(denoiser).layout(denoiser)
    assert (layout.order, layout.calls) == LAYOUTS[name]


# kinds of attention that structure alone does not show, or that were once mistaken: cross, self, joint
KINDS = {
    "LTXVideoTransformer3DModel": (2, 2, 0),
    "AnyFlowTransformer3DModel": (3, 3, 0),
    "WanAnimateTransformer3DModel": (4, 3, 0),
    "Kandinsky3UNet": (6, 4, 0),
    "OmniGenTransformer2DModel": (0, 2, 0),
    "MochiTransformer3DModel": (0, 0, 2),
    "HiDreamImageTransformer2DModel": (0, 1, 1),
    "JoyImageEditTransformer3DModel": (0, 0, 2),
    "PRXTransformer2DModel": (0, 2, 0),
    "Flux2Transformer2DModel": (0, 0, 2),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_attention_are_told_apart(name):
    kinds = trial.sites_of(make({"use": name})).kinds
    assert tuple(kinds.get(f"{kind}_attention", 0) for kind in ("cross", "self", "joint")) == KINDS[name]


def test_blocks_whose_attention_is_a_feed_forward_too_are_a_chain():
    assert trial.sites_of(make({"use": "Flux2Transformer2DModel"})).chains == [2, 2]


@pytest.fixture(scope="module")
def subject():
    return Subject("StableDiffusionPipeline")


def test_a_policy_that_leaves_something_behind_fails(subject, monkeypatch):
    def leave(pipe, spec):
        attached = apply(pipe, spec)
        pipe.unet.conv_out.bias.data += 0.1
        return attached

    apply = trial.apply
    monkeypatch.setattr(trial, "apply", leave)
    before = subject.pipe.unet.conv_out.bias.detach().clone()
    try:
        assert trial.attempt(subject, "tgate:m=3") == Result(FAILS, "undone, the output is not what it was")
    finally:
        subject.pipe.unet.conv_out.bias.data = before


def test_a_wrong_order_of_branches_fails(subject, monkeypatch):
    monkeypatch.setattr(subject, "branches", "cu")
    found = trial.attempt(subject, "adaptive_guidance:m=3")
    assert found == Result(FAILS, "calls are for cu, and are taken for uc")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("tgate:m=40", "the run ends after 6 steps, before the policy begins"),
        ("easycache:threshold=0,first=1", "no change stayed below the threshold"),
        ("block_cache:threshold=0", "no change stayed below the threshold"),
        ("easycache:threshold=1,first=5", "the run ends after 6 steps, before the policy begins"),
    ],
)
def test_a_policy_that_never_acts_is_idle(subject, spec, reason):
    assert trial.attempt(subject, spec) == Result(IDLE, reason)


def test_figures_that_a_policy_needs_are_measured_in_an_uncached_run(subject, monkeypatch):
    folders, made = [], tempfile.TemporaryDirectory
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda: folders.append(made()) or folders[-1])
    assert trial.attempt(subject, "forecast:interval=2").state == WORKS
    assert folders == []
    assert trial.attempt(subject, "block_cache:threshold=9") == Result(WORKS)
    assert [Path(folder.name).exists() for folder in folders] == [False]
    found = trial.attempt(subject, "calibrated:interval=2")
    assert found.state == REFUSED
    assert found.note.startswith("no calibration ships for ")


def test_an_unknown_class_and_a_missing_package_are_reasons():
    assert "no attribute" in examine("NoSuchPipeline", []).reason
    assert examine("DiffusionGemmaPipeline", []).reason.startswith("is a language model")


@pytest.mark.parametrize(
    ("found", "layout", "fits"),
    [
        ("uc", Layout(), True),
        ("-c", Layout(), True),
        ("cu", Layout(), False),
        ("uuuccc", Layout(), True),
        ("uucu", Layout(), True),
        ("", Layout(), True),
        ("ucc", Layout(), False),
        ("c|u", Layout().by_calls(("cond", "uncond")), True),
        ("u|c", Layout().by_calls(("cond", "uncond")), False),
        ("cuu", Layout().alone, True),
    ],
)
def test_branches_are_compared_with_the_layout(found, layout, fits):
    assert agrees(found, layout) is fits


def test_layouts_are_written_as_branches_are():
    assert expected(Layout()) == "uc"
    assert expected(Layout().by_calls(("cond", "uncond"))) == "c|u"


def test_every_text_has_tokens_and_none_is_unknown():
    made = tokenizer()
    tokens = made("a réd cat", padding="max_length", max_length=20)["input_ids"]
    assert len(tokens) == 20
    assert made.unk_token_id not in tokens
    assert made.decode(tokens, skip_special_tokens=True) == "a réd cat"
    assert made.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("<|im_start|>user")


def test_no_layer_is_zero():
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    seed_weights(layer)
    assert torch.all(layer.weight != 0)


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="has torchvision")
def test_a_package_that_is_needed_is_a_reason():
    assert examine("OmniGenPipeline", []).reason == "needs torchvision"


def test_the_known_cause_of_an_error_is_part_of_the_reason():
    reason = examine("ChromaInpaintPipeline", []).reason
    assert re.match(r"it reads a setting that no .* has: pipeline_chroma_inpainting\.py:\d+: AttributeError: ", reason)


def test_a_killed_process_ends_its_trial_alone():
    process = TrialProcess(get_context("spawn"), "StableDiffusionPipeline", [], limit=60)
    process.kill()
    assert process.trial() == Trial("StableDiffusionPipeline", "the process ended with code -9")


def test_a_process_that_takes_too_long_ends_its_trial_alone():
    (found,) = survey(["StableDiffusionPipeline"], SPECS, workers=1, limit=0.01)
    assert found == Trial("StableDiffusionPipeline", "took longer than 0.01 seconds")


def test_the_command_says_which_name_is_wrong():
    done = run("coverage", "NoSuchThing")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: no pipeline has 'NoSuchThing' in its name; give a part of a diffusers class name"
    ]


def canonical(text):
    return JOIN.join(map(str, parse_all(split_specs(text), installed())))


def small_coverage():
    works = Trial("APipeline", results={"tgate:m=3": Result(WORKS), "deepcache": Result(REFUSED, "no | regions")})
    works.sites = {"Net": Sites("unet", {"block": 2}, 3, [])}
    return Coverage(["tgate:m=3", "deepcache"], [Trial("ZPipeline", "needs <x>"), works], {"torch": "1"})


def test_what_is_written_is_what_is_read(tmp_path):
    (tmp_path / "c.json").write_text(small_coverage().to_json())
    again = read(tmp_path / "c.json")
    assert markdown(again) == markdown(small_coverage())
    assert again.counts("tgate:m=3") == {"works": 1, "refused": 0, "idle": 0, "fails": 0}
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(CachekitError, match=r"cannot read coverage .*bad\.json"):
        read(tmp_path / "bad.json")


def test_the_trials_of_other_pipelines_are_kept():
    old = Coverage(["a"], [Trial("A", "old"), Trial("B", "old")])
    assert Coverage(["a"], [Trial("B", "new")]).updating(old).trials == [Trial("B", "new"), Trial("A", "old")]
    with pytest.raises(CachekitError, match="write to another file"):
        Coverage(["b"], []).updating(old)


def test_the_page_names_states_reasons_sites_and_what_was_not_built():
    page = markdown(small_coverage())
    for line in (
        "| `APipeline` |  | `Net` | `tgate` | refused: `deepcache`: no \\| regions |",
        "| `ZPipeline` | needs &lt;x> |",
    ):
        assert line in page.splitlines()
    assert "| `Net` | unet | block x 2 | 3 |  | 1 |" in page


def test_the_published_page_is_that_of_its_data():
    coverage = read(DATA)
    assert (ROOT / "docs" / "coverage.md").read_text() == markdown(coverage)
    assert set(coverage.specs) == {canonical(spec) for spec in ALL}
    assert len(coverage.built) > 200
    assert [f"{trial.pipeline} {spec}: {result}" for trial, spec, result in coverage.results(FAILS)] == []
    assert all(sites.kinds for sites in coverage.denoisers.values() if sites.adapter != "none")
