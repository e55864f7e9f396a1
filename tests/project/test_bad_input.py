"""Files and arguments with any content are read, or refused by a `CachekitError` of one line."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cachekit import CachekitError
from cachekit.cli.generate import _pairs
from cachekit.models.loading import denoiser_from_config
from cachekit.registry.catalog import installed
from cachekit.tools.bench.captions import read_captions
from cachekit.tools.bench.cells import expand
from cachekit.tools.bench.results import read

WORDS = ("images", "annotations", "id", "file_name", "image_id", "caption", "format", "cell")
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(WORDS)
NESTED = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=4)
)
IMAGES = st.lists(st.fixed_dictionaries({"id": PLAIN, "file_name": PLAIN}), max_size=2)
CAPTIONS = st.lists(st.fixed_dictionaries({"id": PLAIN, "image_id": PLAIN, "caption": PLAIN}), max_size=2)
ALMOST = st.fixed_dictionaries({"images": IMAGES, "annotations": CAPTIONS, "format": st.just(1)})
CONTENT = st.binary() | (NESTED | ALMOST).map(lambda data: json.dumps(data).encode() + b"\n")
DEEP = "[" * 20_000

READERS = {"captions.json": lambda path: read_captions(str(path)), "results.jsonl": read}
anything = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def accepts_or_refuses(function, *given):
    line = ""
    try:
        function(*given)
    except CachekitError as error:
        line = str(error)
    assert len(line.splitlines()) <= 1


@pytest.mark.parametrize("name", READERS)
@given(content=CONTENT)
@example(content=DEEP.encode())
@example(content=DEEP.encode() + b"\n")
@example(content=b'{"format": "\\r"}\n')
@example(content=b'{"images": [{"id": Infinity, "file_name": "a"}], "annotations": []}')
@anything
def test_any_file(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    accepts_or_refuses(READERS[name], file)


@given(st.text() | st.text("0123456789²٣-"))
@example("²")
@example("1" * 5000)
@example("a\x00b")
@example("\ud800")
@anything
def test_any_name_of_captions(source):
    accepts_or_refuses(read_captions, source, 2)


@given(st.text() | st.text('ab=[]{}",1:\\'))
@example(f"a={DEEP}")
@example("a=" + "9" * 5000)
@anything
def test_any_pair_of_the_command_line(text):
    accepts_or_refuses(_pairs, [text])


@given(st.text("tgae:m=12|+, ", max_size=12).map(lambda text: "tgate:m=" + text) | st.text())
@anything
def test_any_grid(text):
    accepts_or_refuses(expand, [text], installed())


NESTED_GRID = st.text("evry(n=2;|+, )", max_size=14).map(lambda text: f"cache:where=denoiser,when=window(when={text}")


@given(NESTED_GRID)
@example("cache:where=denoiser,when=window(when=every(2))|every(3)+tgate")
@anything
def test_any_nested_grid(text):
    accepts_or_refuses(expand, [text], installed())


PARTS = ("_class_name", "unet", "transformer", "vae", "UNet2DConditionModel", "utils", "PixArtTransformer2DModel")
FIELDS = (*PARTS, "down_block_types", "layers_per_block", "block_out_channels", "num_layers", "sample_size")
SMALL = st.none() | st.integers(-2, 3) | st.text(max_size=3) | st.sampled_from(FIELDS)
VALUES = SMALL | st.lists(SMALL, max_size=3)
CONFIG = st.dictionaries(st.sampled_from(FIELDS), VALUES) | VALUES
CLASSES = {"_class_name": st.sampled_from([*PARTS, "AutoencoderKL"])}
CONFIGS = (CONFIG | st.fixed_dictionaries(CLASSES, optional=dict.fromkeys(FIELDS[-5:], VALUES))).map(json.dumps)


@example(index="{}", config='{"_class_name": "PixArtTransformer2DModel", "sample_size": 0}')
@given(index=CONFIGS | st.text() | st.just(DEEP), config=CONFIGS | st.text())
@settings(anything, max_examples=50)
def test_any_model_folder(tmp_path, index, config):
    for name, text in (("model_index.json", index), ("config.json", config), ("unet/config.json", config)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8", errors="replace")
    accepts_or_refuses(denoiser_from_config, str(tmp_path))
