"""Specs, files and models are data: nothing in them is run, unless the user's own arguments ask for it."""

from __future__ import annotations

import ast
import json
import pickle
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support import tiny
from support.sources import SHIPPED, each, tree_of

from cachekit import CachekitError
from cachekit.errors import SpecError
from cachekit.interface.specs import parse
from cachekit.models import loading
from cachekit.planning.drawing import draw
from cachekit.registry.catalog import installed

ROOT = Path(__file__).parents[2]

# -- what the source never does --------------------------------------------------------------------------------

RUNNING = {"eval", "exec", "compile", "__import__", "execfile"}
READING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy", "yaml", "ctypes"}
TRUSTING = {"trust_remote_code", "custom_pipeline", "allow_pickle", "shell"}


def sins(tree):
    """Yield what a file does that could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            # Pickle's errors are those of torch, too.
            yield from (it.name for it in node.names if it.name in READING and (it.asname or it.name != "pickle"))
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] in READING:
            yield node.module
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in READING:
            yield from [ast.unparse(node)] * (not node.attr.endswith("Error"))
        elif isinstance(node, ast.Constant) and node.value in TRUSTING:
            yield node.value
        elif isinstance(node, ast.Call):
            yield from sins_of_call(node)


def sins_of_call(node):
    name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name in RUNNING or name in ("os.system", "os.popen"):
        yield name
    if name.endswith("torch.load") and given.get("weights_only") != "True":
        yield name
    yield from TRUSTING & set(given)


@pytest.mark.parametrize(
    ("source", "sin"),
    [
        ("eval(text)", "eval"),
        ("import pickle as p", "pickle"),
        ("import shelve", "shelve"),
        ("pickle.loads(data)", "pickle.loads"),
        ("from dill import loads", "dill"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("load(model, trust_remote_code=True)", "trust_remote_code"),
        ("load(model, **{'custom_pipeline': name})", "custom_pipeline"),
        ("run(command, shell=True)", "shell"),
    ],
)
def test_a_sin_is_found(source, sin):
    assert list(sins(ast.parse(source))) == [sin]


@each([*SHIPPED, *sorted((ROOT / "benchmarks").rglob("*.py"))])
def test_nothing_that_is_read_is_run(path):
    assert list(sins(tree_of(path))) == []


def test_what_pages_do_not_escape_is_drawn_by_us():
    pages = sorted((ROOT / "cachekit").rglob("*.jinja"))
    assert pages
    for page in pages:
        unescaped = re.findall(r"{{[^}]*\|\s*safe\s*}}|{%\s*autoescape false", page.read_text())
        assert all(".picture |" in found for found in unescaped)


def test_a_picture_escapes_every_name():
    hostile = "<script>alert('1')</script>\"&"
    picture = draw([2, 1], [(hostile, hostile, hostile, "Sr")])
    assert "<script" not in picture
    texts = [text.text for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count(hostile) == 2


# -- what hostile input comes to -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", ["__import__('os').getpid()", "${HOME}", "{{7*7}}", "$(id)", "!!python/object:os", "\x00"]
)
def test_values_of_specs_are_not_evaluated(value):
    with pytest.raises(SpecError):
        parse(f"tgate:m={value}", installed())


@pytest.fixture
def folder(tmp_path):
    """Make the folder of a pipeline, and one for files that are made when something in it is run."""
    tiny.small().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def ran(folder):
    return (folder / "ran").exists()


def test_code_that_comes_with_a_model_runs_only_where_the_user_says_so(folder, monkeypatch):
    (folder / "own.py").write_text(
        "from diffusers import StableDiffusionPipeline\n"
        f"open({str(folder / 'ran')!r}, 'w').close()\n"
        "class Own(StableDiffusionPipeline): pass\n"
    )
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": ["own", "Own"]}))
    assert type(loading.denoiser_from_config(str(folder))).__name__ == "UNet2DConditionModel"
    with pytest.raises(CachekitError, match="custom code"):
        loading.pipeline(str(folder))
    assert not ran(folder)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder.parent / "modules"))
    absent = dict.fromkeys(("text_encoder", "tokenizer", "feature_extractor", "safety_checker", "image_encoder"))
    loaded = loading.pipeline(str(folder), trust_remote_code=True, **absent)
    assert ran(folder)
    assert type(loaded).__name__ == "Own"


class Payload:
    def __init__(self, folder):
        self.file = str(folder / "ran")

    def __reduce__(self):
        return (open, (self.file, "w"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_weights_that_are_a_pickle_are_not_run(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.with_suffix(".bin").write_bytes(pickle.dumps({"conv_in.weight": Payload(folder)}))
    weights.unlink()
    assert type(loading.denoiser_from_config(str(folder))).__name__ == "UNet2DConditionModel"
    with pytest.raises(CachekitError, match="cannot read model"):
        loading.pipeline(str(folder))
    assert not ran(folder)
