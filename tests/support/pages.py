"""Tiny pipelines in place of those that documents load; they take prompts."""

from __future__ import annotations

import functools

import diffusers
import torch

from support import tiny

#: Arguments of a call that keep it small.
SMALL = {
    "FluxPipeline": {"height": 16, "width": 16, "output_type": "latent"},
    "QwenImagePipeline": {"height": 32, "width": 32, "output_type": "latent"},
    "WanPipeline": {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"},
    "PixArtAlphaPipeline": {"height": 32, "width": 32, "use_resolution_binning": False, "output_type": "latent"},
    "StableDiffusionPipeline": {"output_type": "latent"},
    "StableDiffusionControlNetPipeline": {"output_type": "latent"},
    "StableDiffusionXLPipeline": {"output_type": "latent"},
    "StableDiffusion3Pipeline": {"output_type": "latent"},
    "StableVideoDiffusionPipeline": {
        "height": 16,
        "width": 16,
        "num_frames": 2,
        "output_type": "latent",
        "num_inference_steps": 6,
    },
}


def stand_ins():
    """Builders of the tiny pipelines, by the class that a document loads."""
    return {
        "StableDiffusionPipeline": tiny.small,
        "StableDiffusionXLPipeline": tiny.sdxl,
        "StableDiffusionControlNetPipeline": tiny.controlled,
        "PixArtAlphaPipeline": tiny.pixart,
        "StableDiffusion3Pipeline": tiny.sd3,
        "FluxPipeline": tiny.flux,
        "QwenImagePipeline": tiny.qwen,
        "WanPipeline": tiny.wan,
        "StableVideoDiffusionPipeline": tiny.svd,
    }


def install(monkeypatch):
    """Replace `from_pretrained`: pipelines are the tiny ones, on any device and in any dtype."""
    for name, make in stand_ins().items():
        cls = getattr(diffusers, name)
        monkeypatch.setattr(cls, "from_pretrained", functools.partial(_loaded, cls, make))
    monkeypatch.setattr(diffusers.ControlNetModel, "from_pretrained", lambda *_, **__: None)


def _loaded(cls, make, name, **_):
    assert "/" in name, "give a hub id"
    loaded = make()
    pipe = prompted(cls)(**_parts(loaded))
    pipe.set_progress_bar_config(disable=True)
    pipe.to = lambda *_: pipe
    return pipe


def _parts(pipe):
    parts = {**pipe.components}
    if isinstance(pipe, (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionControlNetPipeline)):
        parts["requires_safety_checker"] = False
    if isinstance(pipe, diffusers.StableDiffusionXLPipeline):
        parts |= {"force_zeros_for_empty_prompt": False, "add_watermarker": False}
    return parts


def prompted(cls):
    """A subclass with a text encoder that only distinguishes prompts, and calls that are small."""

    class Prompted(cls):
        def encode_prompt(self, prompt=None, *_, **given):
            return _encoded(cls.__name__, prompt if prompt is not None else given.get("prompt_2"))

        @functools.wraps(cls.__call__)
        def __call__(self, *args, **given):
            if cls is diffusers.StableVideoDiffusionPipeline:  # its image encoder takes this size alone
                args = (torch.zeros(1, 3, 16, 16),)
            return super().__call__(*args, **{**SMALL.get(cls.__name__, {}), **given})

    Prompted.__name__ = Prompted.__qualname__ = cls.__name__
    return Prompted


def _encoded(name, prompt):
    """What `encode_prompt` of a class returns."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    text = torch.cat([tiny.text(1, seed=len(one)) for one in prompts])
    other = tiny.text(1, seed=4).repeat(len(prompts), 1, 1)
    mask = torch.ones(text.shape[:2])
    return {
        "StableDiffusionXLPipeline": (text, other, text[:, 0], other[:, 0]),
        "StableDiffusion3Pipeline": (text, other, text[:, 0], other[:, 0]),
        "PixArtAlphaPipeline": (text, mask, other, mask),
        "FluxPipeline": (text, text[:, 0], torch.zeros(text.shape[1], 3)),
        "QwenImagePipeline": (text, mask.long()),
    }.get(name, (text, other))
