"""Load the embedded text-to-image pipeline, after checking its files against their manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachekit.errors import CachekitError

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline
    from torch import nn

__all__ = ["WEIGHTS", "WeightsError", "demo_pipeline", "figures", "load_pipeline", "verify", "write_manifest"]

WEIGHTS = Path(__file__).parent / "weights"
MANIFEST = "manifest.json"


class WeightsError(CachekitError):
    """Say which file of the embedded model is missing or damaged."""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write manifest.json: the SHA-256 of every file that makes up the model in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1) + "\n")


def verify(folder: Path) -> None:
    """Compare every file of the model with the manifest; raise WeightsError at the first that differs."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read the manifest of the demo model {folder.name!r}: {error}") from None
    for name, expected in digests.items():
        path = folder / name
        if not path.is_file():
            raise WeightsError(f"the demo model {folder.name!r} lacks {name}: reinstall cachekit")
        if _digest(path) != expected:
            raise WeightsError(
                f"the demo model {folder.name!r} is damaged: {name} has the wrong SHA-256, reinstall cachekit"
            )


def _config(folder: Path, name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / name).read_text())
    return config


def _fill(module: nn.Module, path: Path, dtype: torch.dtype) -> None:
    """Load half-precision weights into a module of the wanted precision, ready for inference."""
    from safetensors.torch import load_file

    weights = {name: value.to(dtype) for name, value in load_file(path).items()}
    module.load_state_dict(weights, assign=True)
    module.eval().requires_grad_(False)


@contextmanager
def _without_hints() -> Iterator[None]:
    """Keep transformers from telling, on import, that torchvision would be faster at images it never sees."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_pipeline(folder: Path, torch_dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """Check and load the pipeline in `folder`, in single precision unless told otherwise."""
    import torch

    with _without_hints():
        from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
        from diffusers import DPMSolverMultistepScheduler as Scheduler
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    verify(folder)
    dtype = torch_dtype or torch.float32
    unet = UNet2DConditionModel.from_config(_config(folder, "unet/config.json"))
    vae = AutoencoderTiny.from_config(_config(folder, "vae/config.json"))
    text_encoder = CLIPTextModel(CLIPTextConfig(**_config(folder, "text_encoder/config.json")))
    _fill(unet, folder / "unet/diffusion_pytorch_model.safetensors", dtype)
    _fill(vae, folder / "vae/diffusion_pytorch_model.safetensors", dtype)
    _fill(text_encoder, folder / "text_encoder/model.safetensors", dtype)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=Scheduler.from_config(_config(folder, "scheduler/scheduler_config.json")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _folder(kind: str) -> Path:
    known = sorted(path.parent.name for path in WEIGHTS.glob(f"*/{MANIFEST}"))
    if kind not in known:
        raise WeightsError(f"no demo model {kind!r}, there are: {', '.join(known)}")
    return WEIGHTS / kind


def demo_pipeline(kind: str = "unet", torch_dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """Load the small text-to-image pipeline that comes with cachekit.

    It draws 64 x 64 scenes of one to three shapes from captions such as those of `heldout_captions`.
    """
    return load_pipeline(_folder(kind), torch_dtype)


def figures(kind: str = "unet") -> dict[str, Any]:
    """Return the figures that were measured on the shipped weights."""
    return _config(_folder(kind), "figures.json")
