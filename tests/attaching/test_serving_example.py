"""The example of a server answers requests at once, each with specs of its own."""

from __future__ import annotations

import importlib.util
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import cachekit

pytest.importorskip("fastapi", reason="the example of a server needs fastapi")
testclient = pytest.importorskip("fastapi.testclient", reason="fastapi's test client needs httpx2")

EXAMPLE = Path(__file__).parents[2] / "examples" / "serving" / "server.py"
PROMPT, STEPS = "a large red circle top left on white", 6


@pytest.fixture(scope="module")
def server() -> Any:
    spec = importlib.util.spec_from_file_location("serving_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.pipe.set_progress_bar_config(disable=True)
    yield made
    made.attachment.remove()


def drawn(specs: Any, scale: float) -> tuple[bytes, int]:
    """Draw with a pipeline of its own and no server: the pixels, and the calls of the denoiser."""
    pipe = cachekit.demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    attachment = cachekit.apply(pipe, specs) if specs else None
    given = {"num_inference_steps": STEPS, "guidance_scale": scale, "generator": torch.Generator().manual_seed(0)}
    image = pipe(PROMPT, **given).images[0]
    return image.tobytes(), attachment.report().calls if attachment else STEPS


def test_a_thread_shares_models_and_nothing_else(server: Any) -> None:
    """Two threads that share a tokenizer can get each other's padding, once in a while and without an error."""
    mine, other = (ThreadPoolExecutor(1).submit(server.own_pipeline).result().components for _ in range(2))
    shared = {name for name, part in mine.items() if part is not None and part is other[name]}
    assert shared == {"unet", "vae", "text_encoder"}


def test_requests_at_once_are_as_if_each_was_alone(server: Any) -> None:
    client = testclient.TestClient(server.app)

    def ask(quality: str) -> Any:
        return client.get("/image", params={"prompt": PROMPT, "quality": quality, "steps": STEPS})

    with ThreadPoolExecutor(2) as pool:
        answers = dict(zip(("full", "fast"), pool.map(ask, ("full", "fast"))))
    for quality, answer in answers.items():
        assert answer.status_code == 200
        pixels = Image.open(io.BytesIO(answer.content)).tobytes()
        assert (pixels, int(answer.headers["X-Denoiser-Calls"])) == drawn(server.SPECS[quality], server.GUIDANCE)
        assert float(answer.headers["X-Seconds"]) > 0
    refused = ask("draft")
    assert refused.status_code == 422
    assert "no calibration ships" in refused.json()["detail"]
    draft = client.get("/image", params={"prompt": PROMPT, "quality": "draft"})
    assert (draft.status_code, int(draft.headers["X-Denoiser-Calls"])) == (200, 7)
    assert len([line for line in EXAMPLE.read_text().splitlines() if line]) <= 40
