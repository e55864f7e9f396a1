"""Check that the embedded model loads safely, is a real pipeline, and draws what captions say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from cachekit.demo import DEMO_GUIDANCE, DEMO_STEPS, demo_pipeline, heldout_captions
from cachekit.demo.checker import shows
from cachekit.demo.pipeline import WEIGHTS, WeightsError, figures, load_pipeline
from cachekit.errors import CachekitError

UNET = WEIGHTS / "unet"


@pytest.fixture(scope="module")
def pipe() -> Any:
    loaded = demo_pipeline("unet")
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(UNET, tmp_path / "unet"))


def _shown(pipe: Any, prompts: list[str], captions: list[str]) -> int:
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    settings = {"num_inference_steps": DEMO_STEPS, "guidance_scale": DEMO_GUIDANCE, "output_type": "np"}
    images = pipe(prompts, generator=generators, **settings).images
    return sum(bool(shows(image, text)) for image, text in zip(images, captions, strict=True))


def test_held_out_captions_are_mostly_shown(pipe: Any) -> None:
    captions = heldout_captions(12, seed=0)
    assert _shown(pipe, captions, captions) >= 10


def test_without_text_nothing_is_shown(pipe: Any) -> None:
    captions = heldout_captions(6, seed=0)
    assert _shown(pipe, [""] * 6, captions) <= 1


def test_it_is_a_stable_diffusion_pipeline(pipe: Any) -> None:
    names = {name: type(part).__name__ for name, part in pipe.components.items() if part is not None}
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert names == {
        "vae": "AutoencoderTiny",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "scheduler": "DPMSolverMultistepScheduler",
    }
    assert len(pipe.unet.config.block_out_channels) == 3
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}


def test_every_word_is_one_token(pipe: Any) -> None:
    text = heldout_captions(1)[0]
    assert len(pipe.tokenizer(text).input_ids) == len(text.split()) + 2


def test_loading_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        demo_pipeline(torch_dtype=torch.bfloat16)
    assert caplog.records == []


def test_loads_offline_in_silence() -> None:
    code = "from cachekit.demo import demo_pipeline; demo_pipeline()"
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_demo_imports_no_torch() -> None:
    code = "import sys, cachekit.demo; print('torch' in sys.modules or 'diffusers' in sys.modules)"
    environment = {"PATH": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", sorted(json.loads((UNET / "manifest.json").read_text())))
def test_one_changed_byte_is_noticed(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(WeightsError, match=rf"^[^\n]*{Path(name).name}[^\n]*$"):
        load_pipeline(copy)


def test_a_missing_file_is_noticed(copy: Path) -> None:
    (copy / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CachekitError, match=r"lacks unet/diffusion_pytorch_model.safetensors"):
        load_pipeline(copy)


@pytest.mark.parametrize("text", [None, "", "{"])
def test_a_missing_or_damaged_manifest_is_noticed(copy: Path, text: str | None) -> None:
    manifest = copy / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(WeightsError, match="cannot read the manifest"):
        load_pipeline(copy)


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"no demo model 'dut', there are: .*unet"):
        demo_pipeline("dut")


def test_the_manifest_names_every_file() -> None:
    files = {path.relative_to(UNET).as_posix() for path in UNET.rglob("*") if path.is_file()}
    assert files - {"manifest.json", "figures.json"} == set(json.loads((UNET / "manifest.json").read_text()))
    assert sum(path.stat().st_size for path in UNET.rglob("*")) < 25e6


def test_the_figures_were_measured_with_the_shipped_settings() -> None:
    rows = figures()["rows"]
    assert (rows[0]["sampler"], rows[0]["steps"], rows[0]["guidance"]) == ("DPM++", DEMO_STEPS, DEMO_GUIDANCE)
    assert all(0 <= row["shown"] <= 1 and row["error"] >= 0 for row in rows)
