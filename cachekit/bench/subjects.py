"""Load what is measured: the embedded model, a pipeline that takes a prompt, or an architecture, for times alone."""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cachekit.bench.cells import BenchError, Setting, digest
from cachekit.bench.measuring import Arguments
from cachekit.errors import nearest
from cachekit.models.architectures import Architecture, architecture, architecture_of, architectures
from cachekit.models.demo.pipeline import PIPELINES, folders
from cachekit.models.loading import (
    DEMOS,
    call_arguments,
    denoiser_from_config,
    move,
    pipeline,
    precision,
    scheduler_for,
)
from cachekit.upstream.pipelines import denoiser_of

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Subject",
    "class_of_pipeline",
    "load",
    "model_hash",
    "own_scheduler",
    "set_scheduler",
    "shape_of_model",
]


@dataclass(frozen=True)
class Subject:
    """A loaded pipeline, its arguments for a caption, and whether its images can be checked against captions."""

    pipe: Any
    arguments: Arguments
    draws_scenes: bool = False


def load(setting: Setting) -> Subject:
    """Load the model of a setting onto its device and in its precision."""
    from diffusers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if setting.model in architectures():
        pipe = _random_pipeline(architecture(setting.model))
        pipe.to(**precision(setting.dtype))
    else:
        pipe = pipeline(setting.model, **precision(setting.dtype), **_absent(setting.model))
    move(pipe, setting.device)
    pipe.set_progress_bar_config(disable=True)
    if setting.compiled:
        _compile(denoiser_of(pipe), setting.compiled)
    return Subject(pipe, _arguments(pipe, setting), setting.model in DEMOS)


def _compile(denoiser: Any, backend: str) -> None:
    """Compile the repeated blocks alone: policies act around and inside them, so the whole changes with each plan."""
    import torch

    if backend not in torch.compiler.list_backends(exclude_tags=()):
        known = torch.compiler.list_backends()
        raise BenchError(f"unknown compiler backend {backend!r}{nearest(backend, known)}; known: {', '.join(known)}")
    if not getattr(denoiser, "_repeated_blocks", None):
        raise BenchError(f"{type(denoiser).__name__} names no blocks that repeat, so it cannot be compiled here")
    denoiser.compile_repeated_blocks(backend=backend)


def _absent(model: str) -> dict[str, None]:
    """Components a saved pipeline was saved without, as arguments that its loader requires."""
    from diffusers import DiffusionPipeline

    if model in DEMOS or not Path(model).is_dir():
        return {}
    index = DiffusionPipeline.load_config(model)
    return {name: None for name, entry in index.items() if isinstance(entry, (list, tuple)) and entry[0] is None}


def shape_of_model(model: str) -> nn.Module:
    """Build a model's denoiser without weights, once for each content of its files.

    A name close to an architecture's is refused as a misspelling.
    """
    near = model not in DEMOS and not Path(model).exists() and nearest(model, architectures())
    if model in architectures() or near:
        return architecture(model).build()
    return _shape_of_files(model, model_hash(model))


@lru_cache(maxsize=4)
def _shape_of_files(model: str, digest_of_files: str) -> nn.Module:
    return denoiser_from_config(model)


def model_hash(model: str) -> str:
    """Digest of a model's files, or of its configuration where it is an architecture without files."""
    if model in architectures():
        return digest(asdict(architecture(model)))
    found = hashlib.sha256()
    for folder in _folders(model):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            found.update(path.relative_to(folder).as_posix().encode())
            with path.open("rb") as file:
                for chunk in iter(partial(file.read, 1 << 20), b""):
                    found.update(chunk)
    return found.hexdigest()[:16]


def own_scheduler(model: str) -> Any:
    """Load a model's own scheduler, without its weights."""
    import diffusers

    if model in architectures():
        return _scheduler(architecture(model))
    folder = _folders(model)[-1] / "scheduler"
    name = diffusers.DDIMScheduler.load_config(folder)["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder)


def class_of_pipeline(model: str) -> str:
    """Name of a model's pipeline class, found without loading weights."""
    if model in DEMOS:
        return PIPELINES[DEMOS[model]]
    if model in architectures():
        return _pipeline_name(architecture(model))
    from diffusers import DiffusionPipeline

    return str(DiffusionPipeline.load_config(model)["_class_name"])


def set_scheduler(pipe: Any, name: str) -> None:
    """Replace a pipeline's scheduler by a new one of that class, which carries no state of earlier runs."""
    pipe.scheduler = scheduler_for(pipe, name)


def _folders(model: str) -> tuple[Path, ...]:
    """Folders of a model's files; the last one holds its scheduler."""
    if model in DEMOS:
        return folders(DEMOS[model])
    if Path(model).is_dir():
        return (Path(model),)
    from diffusers import DiffusionPipeline

    try:
        return (Path(DiffusionPipeline.download(model)),)
    except (OSError, ValueError) as error:
        raise BenchError(f"cannot read model {model!r}: {str(error).strip().splitlines()[0]}") from error


# -- how a pipeline is called -----------------------------------------------------------------------------


def _arguments(pipe: Any, setting: Setting) -> Arguments:
    from cachekit.models.demo import DEMO_GUIDANCE

    known = inspect.signature(type(pipe).__call__).parameters
    if "prompt" not in known:
        raise BenchError(f"{type(pipe).__name__} takes no prompt; only pipelines that read text can be measured")
    scale = setting.guidance
    if scale is None and setting.model in DEMOS:
        scale = DEMO_GUIDANCE
    if scale is None and setting.model in architectures():
        scale = 5.0 if architecture(setting.model).guided else 1.0
    fixed = {"height": setting.height, "width": setting.width, "guidance_scale": scale}
    given: dict[str, Any] = {name: value for name, value in fixed.items() if value is not None}
    given |= call_arguments(setting.model, pipe)
    given["output_type"] = "latent" if setting.model in architectures() else "pil"
    if getattr(pipe, "tokenizer", None) is not None:
        return lambda prompt: {"prompt": prompt, **given}
    return lambda prompt: {**_random_text(pipe, prompt), **given}


def _random_text(pipe: Any, prompt: str) -> dict[str, Any]:
    """Random embeddings for a pipeline without text encoder, the same for the same prompt: right for times alone."""
    import torch

    denoiser = denoiser_of(pipe)
    known = architecture_of(denoiser)
    generator = torch.Generator().manual_seed(int(digest(prompt)[:12], 16))

    def random(*shape: int) -> Any:
        return torch.randn(1, *shape, generator=generator).to(pipe.device, next(denoiser.parameters()).dtype)

    text = random(2, known.tokens, known.text_width)[0]
    given: dict[str, Any] = {"prompt_embeds": text[:1], "negative_prompt_embeds": text[1:]}
    if known.cls == "PixArtTransformer2DModel":
        mask = torch.ones(1, known.tokens, device=pipe.device)
        masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        return {**given, **masks, "negative_prompt": None, "use_resolution_binning": False}
    if known.config.get("addition_embed_type") == "text_time":
        width = known.config["projection_class_embeddings_input_dim"] - 6 * known.config["addition_time_embed_dim"]
        pooled = random(2, width)[0]
        given |= {"pooled_prompt_embeds": pooled[:1], "negative_pooled_prompt_embeds": pooled[1:]}
    return given


# -- an architecture without trained weights --------------------------------------------------------------


def _random_pipeline(known: Architecture) -> Any:
    """Build a pipeline around an architecture with random weights: right for times, not for images."""
    import diffusers
    import torch

    torch.manual_seed(0)
    parts = {"vae": _small_vae(), "scheduler": _scheduler(known), "tokenizer": None, "text_encoder": None}
    denoiser = known.build("cpu", torch.float32)
    name = _pipeline_name(known)
    kind: Any = getattr(diffusers, name)
    if name.startswith("PixArt"):
        return kind(transformer=denoiser, **parts)
    if name == "StableDiffusionXLPipeline":
        second = {"tokenizer_2": None, "text_encoder_2": None, "force_zeros_for_empty_prompt": False}
        return kind(unet=denoiser, add_watermarker=False, **parts, **second)
    checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind(unet=denoiser, **parts, **checker)


def _pipeline_name(known: Architecture) -> str:
    if known.cls == "PixArtTransformer2DModel":
        return "PixArtSigmaPipeline" if known.tokens > 120 else "PixArtAlphaPipeline"
    is_xl = known.config.get("addition_embed_type") == "text_time"
    return "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline"


def _small_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 8, 8, 8],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
    )


def _scheduler(known: Architecture) -> Any:
    import diffusers

    if not known.guided:
        return diffusers.LCMScheduler()
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
