"""The embedded text-to-image pipelines; their files are checked against a manifest when they are loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachekit.errors import CachekitError, nearest
from cachekit.models.names import DEMOS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = [
    "PIPELINES",
    "WEIGHTS",
    "WeightsError",
    "demo_pipeline",
    "figures",
    "folders",
    "load_pipeline",
    "verify",
    "write_manifest",
]

WEIGHTS = Path(__file__).parent / "weights"
MANIFEST = "manifest.json"
FIGURES = "figures.json"
#: Classes of the embedded pipelines by kind; the others share the components of the first.
PIPELINES = {
    "unet": "StableDiffusionPipeline",
    "dit": "PixArtAlphaPipeline",
    "flow": "StableDiffusion3Pipeline",
    "lcm": "LatentConsistencyModelPipeline",
}
SHARED = WEIGHTS / "unet"
_WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
#: Matrices of low rank that a model adds to the weights of the shared UNet.
ADDED_FILE = "added.safetensors"
#: Arguments of pipelines that would check images for their content otherwise.
_UNCHECKED: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class WeightsError(CachekitError):
    """A file of an embedded model that is missing or damaged."""


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Write manifest.json: the SHA-256 of every file of the model in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (MANIFEST, FIGURES))
    digests = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(digests, indent=1) + "\n")


def verify(folder: Path) -> None:
    """Check every file of the model in `folder` against its manifest.

    Raises `WeightsError` at the first that is missing or differs.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"cannot read the manifest of the demo model {folder.name!r}: {error}; reinstall cachekit"
        ) from None
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
    """Load the weights of a file into `module`."""
    from safetensors.torch import load_file

    _give(module, load_file(path), dtype)


def _give(module: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Give `module` its weights, converted to `dtype`, and prepare it for inference."""
    module.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    module.eval().requires_grad_(False)


@contextmanager
def _without_hints() -> Iterator[None]:
    """Silence the hint of transformers, on import, that torchvision would be faster."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_pipeline(folder: Path, torch_dtype: torch.dtype | None = None, shared: Path = SHARED) -> Any:
    """Check and load the pipeline in `folder`, by default in single precision.

    A transformer's folder holds the transformer alone: text encoder, autoencoder and scheduler come from `shared`. That
    of the latent consistency model holds what is added to the weights of the shared UNet. Raises `WeightsError` for a
    missing or damaged file.
    """
    import torch

    verify(folder)
    dtype = torch_dtype or torch.float32
    if (folder / "vae").is_dir():
        return _unet_pipeline(folder, dtype)
    verify(shared)
    components = _shared_components(shared, dtype)
    if (folder / "scheduler").is_dir():
        components["scheduler"] = _scheduler(folder)
    if (folder / "unet").is_dir():
        return _lcm_pipeline(_lcm(folder, shared, dtype), components)
    return _transformer_pipeline(_transformer(folder, dtype), components)


def _unet_pipeline(folder: Path, dtype: torch.dtype) -> Any:
    with _without_hints():
        from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(_config(folder, "unet/config.json"))
    _fill(unet, folder / "unet" / _WEIGHTS_FILE, dtype)
    return StableDiffusionPipeline(unet=unet, **_shared_components(folder, dtype), **_UNCHECKED)


def _lcm(folder: Path, shared: Path, dtype: torch.dtype) -> nn.Module:
    """Build the shared UNet with the input for a guidance scale, and add the folder's matrices to its weights."""
    from safetensors.torch import load_file

    with _without_hints():
        from diffusers import UNet2DConditionModel

    weights = {name: value.float() for name, value in load_file(shared / "unet" / _WEIGHTS_FILE).items()}
    added = {name: value.float() for name, value in load_file(folder / "unet" / ADDED_FILE).items()}
    for name in [name.removesuffix(".up") for name in added if name.endswith(".up")]:
        product = added.pop(f"{name}.up") @ added.pop(f"{name}.down")
        weights[f"{name}.weight"] += product.view_as(weights[f"{name}.weight"])
    unet: nn.Module = UNet2DConditionModel.from_config(_config(folder, "unet/config.json"))
    _give(unet, {**weights, **added}, dtype)
    return unet


def _lcm_pipeline(unet: nn.Module, shared: dict[str, Any]) -> Any:
    with _without_hints():
        import cachekit.models.demo.variants as variants

    return variants.LatentConsistencyModelPipeline(unet=unet, **shared, **_UNCHECKED)


def _transformer(folder: Path, dtype: torch.dtype) -> nn.Module:
    import diffusers

    config = _config(folder, "transformer/config.json")
    transformer: nn.Module = getattr(diffusers, config["_class_name"]).from_config(config)
    _fill(transformer, folder / "transformer" / _WEIGHTS_FILE, dtype)
    return transformer


def _transformer_pipeline(transformer: nn.Module, shared: dict[str, Any]) -> Any:
    """Make the pipeline of a transformer, of the class that takes it, from the components that all models share."""
    with _without_hints():
        import cachekit.models.demo.variants as variants

    if type(transformer).__name__ == "PixArtTransformer2DModel":
        return variants.PixArtAlphaPipeline(transformer=transformer, **shared)
    encoder, tokenizer = variants.projecting(shared["text_encoder"]), shared["tokenizer"]
    return variants.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=shared["scheduler"],
        vae=shared["vae"],
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def _shared_components(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Load all components but the denoiser."""
    with _without_hints():
        from diffusers import AutoencoderTiny
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

    vae = AutoencoderTiny.from_config(_config(folder, "vae/config.json"))
    text_encoder = CLIPTextModel(CLIPTextConfig(**_config(folder, "text_encoder/config.json")))
    _fill(vae, folder / "vae/diffusion_pytorch_model.safetensors", dtype)
    # transformers 4 wraps the network whose weights these are.
    _fill(getattr(text_encoder, "text_model", text_encoder), folder / "text_encoder/model.safetensors", dtype)
    return {
        "vae": vae,
        "text_encoder": text_encoder.eval(),
        "tokenizer": CLIPTokenizerFast.from_pretrained(folder / "tokenizer"),
        "scheduler": _scheduler(folder),
    }


def _scheduler(folder: Path) -> Any:
    import diffusers

    config = _config(folder, "scheduler/scheduler_config.json")
    return getattr(diffusers, config["_class_name"]).from_config(config)


def folders(kind: str) -> tuple[Path, ...]:
    """List the folders of a model: its own first, then the one of the components that it shares.

    Raises `WeightsError` for an unknown kind.
    """
    kind = DEMOS.get(kind, kind)
    if kind not in PIPELINES:
        known = [*PIPELINES, *DEMOS]
        raise WeightsError(f"no demo model {kind!r}{nearest(kind, known)}, there are: {', '.join(PIPELINES)}")
    return tuple(dict.fromkeys((WEIGHTS / kind, SHARED)))


def demo_pipeline(kind: str = "unet", torch_dtype: torch.dtype | None = None) -> Any:
    """Load one of the small text-to-image pipelines that come with cachekit.

        pipe = cachekit.demo_pipeline()
        image = pipe("a large red circle top left on white").images[0]

    It draws 64 x 64 scenes of one to three shapes from captions such as those of `heldout_captions`. The kinds are
    "unet", "dit" (a transformer with cross-attention), "flow" (one with joint attention, of rectified flow) and "lcm"
    (a latent consistency model of 4 steps); the names of the command line, such as "demo-dit", are the same. Raises
    `WeightsError` for an unknown kind or a damaged file.
    """
    return load_pipeline(folders(kind)[0], torch_dtype)


def figures(kind: str = "unet") -> dict[str, Any]:
    """Read the figures measured on the shipped weights."""
    return _config(folders(kind)[0], FIGURES)
