"""Denoisers of published models, built from their configs without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import nn

from cachekit.errors import CachekitError, nearest
from cachekit.models.inputs import INPUTS, Sample
from cachekit.upstream.guidance import takes_scale
from cachekit.upstream.pipelines import denoisers_of
from cachekit.upstream.schedulers import scheduler_of
from cachekit.upstream.weights import kept_in_float32

#: Default number of pixels per latent along each side, as in the autoencoders of Stable Diffusion.
PIXELS_PER_LATENT = 8
#: For each class, a published denoiser, and the key of the config that has the width of the text embeddings; none, ""
#: where it is given classes in place of texts.
_PUBLISHED = {
    "UNet2DConditionModel": ("sd15", "cross_attention_dim"),
    "PixArtTransformer2DModel": ("pixart-alpha", "caption_channels"),
    "SD3Transformer2DModel": ("sd3", "joint_attention_dim"),
    "FluxTransformer2DModel": ("flux", "joint_attention_dim"),
    "QwenImageTransformer2DModel": ("qwen-image", "joint_attention_dim"),
    "WanTransformer3DModel": ("wan", "text_dim"),
    "HunyuanVideoTransformer3DModel": ("hunyuan-video", "text_embed_dim"),
    "CogVideoXTransformer3DModel": ("cogvideox", "text_embed_dim"),
    "DiTTransformer2DModel": ("dit-xl", ""),
}


#: Keys of a config that models of one architecture may differ in.
_FREE = frozenset({"sample_size"})


@dataclass(frozen=True)
class Architecture:
    """Class, config and inputs of one published denoiser."""

    name: str
    #: Name of the class in diffusers.
    cls: str
    config: dict[str, Any]
    #: Length and width of the text embeddings: `(batch, tokens, text_width)`.
    tokens: int
    text_width: int
    #: Height of the latents at the model's own size, and their width too unless `latent_width` is given.
    latent: int
    #: Whether the model is published with classifier-free guidance, that is two branches.
    guided: bool
    #: Classes of the pipeline and the scheduler that the model is published with, and the steps of a run by default.
    pipeline: str
    scheduler: str
    steps: int
    #: Where latents are packed into tokens, those of a token count as one.
    pixels_per_latent: int = PIXELS_PER_LATENT
    latent_width: int | None = None
    #: Frames of the latents, where the model makes videos.
    frames: int = 1

    @property
    def pooled(self) -> int:
        """Width of the pooled text, 0 for a model that reads none."""
        if self.config.get("addition_embed_type") == "text_time":
            times = 6 * self.config["addition_time_embed_dim"]
            return int(self.config["projection_class_embeddings_input_dim"] - times)
        return int(self.config.get("pooled_projection_dim", 0))

    def has_config(self, config: dict[str, Any]) -> bool:
        """Whether a denoiser of the class with this config has the architecture."""
        own = {key: value for key, value in _plain(self.config).items() if key not in _FREE}
        return all(config.get(key) == value for key, value in own.items())

    @property
    def published_scheduler(self) -> Any:
        """A scheduler of the class that the model is published with."""
        import diffusers

        return getattr(diffusers, self.scheduler)()

    def build(self, device: str = "meta", dtype: torch.dtype = torch.float16) -> nn.Module:
        """Build the denoiser, with random weights unless it is on the meta device.

        As in `from_pretrained`, layers that the class keeps in float32 stay in it, as do tables that no checkpoint has.
        """
        import diffusers

        with torch.device(device):
            model: nn.Module = getattr(diffusers, self.cls).from_config(self.config)
        precise = kept_in_float32(model)
        saved = model.state_dict(keep_vars=True)
        for name, tensor in saved.items():
            if tensor.is_floating_point() and precise.isdisjoint(name.split(".")):
                tensor.data = tensor.data.to(dtype)
        return model.eval()

    def inputs(
        self,
        batch: int,
        height: int | None = None,
        width: int | None = None,
        device: str = "meta",
        dtype: torch.dtype = torch.float16,
    ) -> dict[str, Any]:
        """Make the arguments of one forward for a `batch` over all branches, of height x width pixels.

        Raises `CachekitError` for a size that is not a multiple of `pixels_per_latent`.
        """
        rows = self._latents(height, self.latent)
        columns = self._latents(width, self.latent_width or self.latent)
        text = (self.tokens, self.text_width)
        sample = Sample(self.config, text, self.pooled, batch, self.frames, rows, columns, device, dtype)
        return INPUTS[self.cls](sample)

    def _latents(self, pixels: int | None, own: int) -> int:
        """Convert a size from pixels to latents; None is the model's own size."""
        if pixels is None:
            return own
        if pixels % self.pixels_per_latent:
            raise CachekitError(f"a size of {pixels} pixels: give a multiple of {self.pixels_per_latent}")
        return pixels // self.pixels_per_latent


@cache
def architectures() -> dict[str, Architecture]:
    """Read the table of known architectures, by name."""
    table = json.loads(resources.files("cachekit.models").joinpath("architectures.json").read_text())
    return {name: Architecture(name, row.pop("class"), **row) for name, row in sorted(table.items())}


def architecture(name: str) -> Architecture:
    """Look up an architecture by name.

    Raises `CachekitError` with the nearest known name.
    """
    known = architectures()
    if name not in known:
        raise CachekitError(f"unknown model {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    return known[name]


def recognised(denoiser: nn.Module, scheduler: str = "") -> Architecture | None:
    """Find the architecture that a denoiser has, whatever its weights and its image size; None for another one.

    Of several, it is the one with the longest config, as distilled models have further keys; of those with the same
    config the one that is published with `scheduler`, else one with guidance.
    """
    config, kind = _plain(getattr(denoiser, "config", {})), type(denoiser).__name__
    fitting = [one for one in architectures().values() if one.cls == kind and one.has_config(config)]
    return max(fitting, key=lambda one: (len(one.config), one.scheduler == scheduler, one.guided), default=None)


def guided_by_default(model: Any, scale: float | None = None) -> bool:
    """Whether runs of a model have two guidance branches, at the scale that is asked for or at their own.

    `model` is the name of an architecture, or a pipeline, or a denoiser. An architecture runs as it was published, and
    so does what is recognised as one. All else has branches, unless the guidance scale is an input of a denoiser.
    """
    if scale is not None and scale <= 1:
        return False
    if isinstance(model, str):
        return architecture(model).guided
    scheduler = type(scheduler_of(model)).__name__
    denoisers = denoisers_of(model).values()
    found = [recognised(denoiser, scheduler) for denoiser in denoisers]
    return not any(map(takes_scale, denoisers)) and all(one is None or one.guided for one in found)


def _plain(config: Any) -> dict[str, Any]:
    """Write tuples of a config as lists, as they are read from a file."""
    found: dict[str, Any] = json.loads(json.dumps(dict(config), default=str))
    return found


def architecture_of(denoiser: nn.Module, pixels_per_latent: int = PIXELS_PER_LATENT) -> Architecture:
    """Describe a loaded denoiser by the published one that it is, else that of its class, and by its own config.

    Raises `CachekitError` for a class whose inputs aren't known.
    """
    name, config = type(denoiser).__name__, dict(getattr(denoiser, "config", {}))
    if name not in _PUBLISHED:
        raise CachekitError(f"the inputs of {name} are not known: give inputs= with the arguments of one forward")
    published, width = _PUBLISHED[name]
    known = recognised(denoiser) or architecture(published)
    return replace(
        known,
        name=name,
        config=config,
        text_width=config.get(width, 0),
        latent=config.get("sample_size", known.latent),
        guided=True,
        pixels_per_latent=pixels_per_latent * known.pixels_per_latent // PIXELS_PER_LATENT,
    )
