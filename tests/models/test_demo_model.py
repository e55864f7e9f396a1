"""The embedded models load safely, are real pipelines, and draw their captions."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

import cachekit
from cachekit.errors import CachekitError
from cachekit.models.demo import DEMO_GUIDANCE, DEMO_STEPS, demo_pipeline, heldout_captions
from cachekit.models.demo.checker import shows
from cachekit.models.demo.pipeline import PIPELINES, WEIGHTS, WeightsError, figures, load_pipeline
from cachekit.upstream.pipelines import denoiser_of

FILES = [(kind, name) for kind in PIPELINES for name in json.loads((WEIGHTS / kind / "manifest.json").read_text())]


@pytest.fixture(scope="module", params=PIPELINES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def pipe(kind: str) -> Any:
    loaded = demo_pipeline(kind)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, Path]:
    return {kind: Path(shutil.copytree(WEIGHTS / kind, tmp_path / kind)) for kind in PIPELINES}


def _steps(pipe: Any) -> int:
    return 4 if type(pipe).__name__ == PIPELINES["lcm"] else DEMO_STEPS


def _draw(pipe: Any, prompts: list[str], steps: int | None = None) -> Any:
    generators = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
    settings = {"num_inference_steps": steps or _steps(pipe), "guidance_scale": DEMO_GUIDANCE, "output_type": "np"}
    return pipe(prompts, generator=generators, **settings).images


def _shown(pipe: Any, prompts: list[str], captions: list[str]) -> int:
    images = _draw(pipe, prompts)
    return sum(bool(shows(image, text)) for image, text in zip(images, captions, strict=True))


def test_as_many_captions_are_shown_as_the_figures_say(kind: str, pipe: Any) -> None:
    captions = heldout_captions(10, seed=0)
    measured = figures(kind)["rows"][0]["shown"]
    assert binom.cdf(_shown(pipe, captions, captions), 10, measured) > 0.005


def test_without_text_nothing_is_shown(pipe: Any) -> None:
    captions = heldout_captions(6, seed=0)
    assert _shown(pipe, [""] * 6, captions) <= 1


def test_the_same_seed_draws_the_same_image(kind: str, pipe: Any) -> None:
    captions = heldout_captions(1)
    assert (_draw(pipe, captions, 3) == _draw(pipe, captions, 3)).all()
    other = demo_pipeline(kind)
    other.set_progress_bar_config(disable=True)
    assert (_draw(other, captions, 3) == _draw(pipe, captions, 3)).all()


def test_a_policy_acts_is_undone_and_acts_again(kind: str, pipe: Any) -> None:
    spec, site, reused = (
        ("fora:interval=5", "joint_attention", 4) if kind == "flow" else ("tgate:m=2", "cross_attention", 3)
    )
    captions = heldout_captions(2)
    plain = _draw(pipe, captions, 5)
    with cachekit.apply(pipe, spec) as attachment:
        cached = _draw(pipe, captions, 5)
        counts = attachment.report().counts
    assert abs(cached - plain).max() > 0.01
    attention = next(count for count in counts if str(count.kind) == site)
    assert (attention.stored, attention.reused, attention.missed) == (attention.targets, reused * attention.targets, 0)
    assert (_draw(pipe, captions, 5) == plain).all()
    with cachekit.apply(pipe, spec):
        assert (_draw(pipe, captions, 5) == cached).all()


def test_it_is_a_real_pipeline(kind: str, pipe: Any) -> None:
    denoiser = denoiser_of(pipe)
    names = {
        name: type(part).__name__.removesuffix("Fast") for name, part in pipe.components.items() if part is not None
    }
    unet = "UNet2DConditionModel"
    classes = {"unet": unet, "dit": "PixArtTransformer2DModel", "flow": "SD3Transformer2DModel", "lcm": unet}
    schedulers = {"flow": "FlowMatchEulerDiscreteScheduler", "lcm": "LCMScheduler"}
    text = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    if kind == "flow":
        text = {"text_encoder": "CLIPTextModelWithProjection", "tokenizer": "CLIPTokenizer"}
        text |= {f"{name}_2": value for name, value in text.items()}
    assert type(pipe).__name__ == PIPELINES[kind]
    assert names == {
        "vae": "AutoencoderTiny",
        **text,
        "unet" if classes[kind] == unet else "transformer": classes[kind],
        "scheduler": schedulers.get(kind, "DPMSolverMultistepScheduler"),
    }
    assert {parameter.dtype for parameter in denoiser.parameters()} == {torch.float32}
    assert 4e6 < sum(parameter.numel() for parameter in denoiser.parameters()) < 1e7


def test_a_call_with_the_prompt_alone_shows_its_scene(pipe: Any) -> None:
    torch.manual_seed(0)  # a generator would be an argument
    caption = "a small red square top left on white"
    image = pipe(caption).images[0]
    assert image.size == (64, 64)
    assert shows(np.asarray(image) / 255, caption)


def test_the_added_layer_and_projection_of_the_flow_model_are_the_identity() -> None:
    shared, flow = demo_pipeline("unet"), demo_pipeline("flow")
    tokens = shared.tokenizer(heldout_captions(2), padding="max_length", return_tensors="pt").input_ids
    plain = shared.text_encoder(tokens, output_hidden_states=True)
    given = flow.encode_prompt(heldout_captions(2), None, None, do_classifier_free_guidance=False)
    states = given[0]
    assert states.shape == (2, tokens.shape[1], 2 * plain.last_hidden_state.shape[2])
    network = getattr(shared.text_encoder, "text_model", shared.text_encoder)
    normed = network.final_layer_norm(states[..., : states.shape[2] // 2])
    torch.testing.assert_close(normed, plain.last_hidden_state)
    torch.testing.assert_close(given[2][:, : given[2].shape[1] // 2], plain.pooler_output)


def test_every_word_is_one_token(pipe: Any) -> None:
    text = heldout_captions(1)[0]
    assert len(pipe.tokenizer(text).input_ids) == len(text.split()) + 2


def test_loading_warns_of_nothing(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        demo_pipeline(kind, torch_dtype=torch.bfloat16)
    assert caplog.records == []


def test_all_load_offline_in_silence() -> None:
    code = f"from cachekit.models.demo import demo_pipeline; [demo_pipeline(kind) for kind in {[*PIPELINES]}]"
    environment = {"HF_HUB_OFFLINE": "1", "PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_the_demo_imports_no_torch() -> None:
    code = "import sys, cachekit.models.demo; print('torch' in sys.modules or 'diffusers' in sys.modules)"
    environment = {"PATH": "", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_one_changed_byte_is_noticed(copies: dict[str, Path], kind: str, name: str) -> None:
    path = copies[kind] / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=rf"^[^\n]*{kind}[^\n]*{path.name}[^\n]*$"):
        load_pipeline(copies["dit" if kind == "unet" else kind], shared=copies["unet"])


def test_the_model_with_all_parts_is_checked_when_it_is_loaded_alone(copies: dict[str, Path]) -> None:
    (copies["unet"] / "unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CachekitError, match=r"lacks unet/diffusion_pytorch_model.safetensors"):
        load_pipeline(copies["unet"])


@pytest.mark.parametrize("text", [None, "", "{"])
def test_a_missing_or_damaged_manifest_is_noticed(copies: dict[str, Path], text: str | None) -> None:
    manifest = copies["unet"] / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(WeightsError, match="cannot read the manifest"):
        load_pipeline(copies["unet"])


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"no demo model 'dut' \(did you mean 'dit'\?\), there are: .*unet"):
        demo_pipeline("dut")


@pytest.mark.parametrize("name", [*PIPELINES, "classifier"])
def test_the_manifest_names_every_file(name: str) -> None:
    folder = WEIGHTS / name
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files - {"manifest.json", "figures.json"} == set(json.loads((folder / "manifest.json").read_text()))


def test_all_weights_together_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*")) < 45e6


def test_the_figures_were_measured_with_the_shipped_settings(kind: str) -> None:
    rows = figures(kind)["rows"]
    sampler, steps = {"flow": ("flow Euler", DEMO_STEPS), "lcm": ("LCM", 4)}.get(kind, ("DPM++", DEMO_STEPS))
    assert (rows[0]["sampler"], rows[0]["steps"], rows[0]["guidance"]) == (sampler, steps, DEMO_GUIDANCE)
    assert all(0 <= row["shown"] <= 1 and row["error"] >= 0 for row in rows)
