"""Pipelines around published architectures with random weights: right for times, not for images."""

from __future__ import annotations

from typing import Any

from cachekit.models.architectures import Architecture

__all__ = ["scheduler_of", "untrained_pipeline", "untrained_text"]
#: Text encoders of each pipeline, which has as many tokenizers.
_ENCODERS = {"StableDiffusionXLPipeline": 2, "StableDiffusion3Pipeline": 3, "FluxPipeline": 2}


def untrained_pipeline(known: Architecture, device: str = "cpu", dtype: Any = None) -> Any:
    """Build a pipeline with random weights, by default in float32; it has no text encoder, and gives latents."""
    import diffusers
    import torch

    torch.manual_seed(0)
    name = known.pipeline
    denoiser = known.build(device, dtype or torch.float32)
    parts: dict[str, Any] = {"scheduler": scheduler_of(known), **_without_texts(_ENCODERS.get(name, 1))}
    if known.cls == "UNet2DConditionModel":
        parts |= {"unet": denoiser, "vae": _small_vae()}
    else:
        parts |= {"transformer": denoiser, "vae": _small_vae() if name.startswith("PixArt") else None}
    if name == "StableDiffusionXLPipeline":
        parts |= {"force_zeros_for_empty_prompt": False, "add_watermarker": False}
    if name == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, name)(**parts)


def scheduler_of(known: Architecture) -> Any:
    """Make a scheduler for the model's own kind of noise schedule."""
    import diffusers

    if known.cls == "WanTransformer3DModel":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if known.cls == "SD3Transformer2DModel":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if known.scheduler.startswith("FlowMatch"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    if not known.guided:
        return diffusers.LCMScheduler()
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )


def untrained_text(known: Architecture, seed: int, device: Any, dtype: Any) -> dict[str, Any]:
    """Draw embeddings of a prompt, the same for the same seed, as arguments for a pipeline without text encoder."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Any:
        return torch.randn(1, *shape, generator=generator).to(device, dtype)

    text = random(2, known.tokens, known.text_width)[0]
    given: dict[str, Any] = {"prompt_embeds": text[:1], "negative_prompt_embeds": text[1:]}
    if known.pooled:
        pooled = random(2, known.pooled)[0]
        given |= {"pooled_prompt_embeds": pooled[:1], "negative_pooled_prompt_embeds": pooled[1:]}
    if known.cls == "FluxTransformer2DModel":
        # A negative prompt would be for guidance by a second branch, which the model doesn't need.
        return {name: value for name, value in given.items() if not name.startswith("negative")}
    if known.cls == "PixArtTransformer2DModel":
        mask = torch.ones(1, known.tokens, device=device)
        masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
        return {**given, **masks, "negative_prompt": None, "use_resolution_binning": False}
    if known.cls == "QwenImageTransformer2DModel":
        mask = torch.ones(1, known.tokens, device=device, dtype=torch.long)
        return {**given, "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask}
    return given


def _without_texts(encoders: int) -> dict[str, None]:
    names = ["", *(f"_{number}" for number in range(2, encoders + 1))]
    return {f"{part}{name}": None for part in ("tokenizer", "text_encoder") for name in names}


def _small_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[8, 8, 8, 8],
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        norm_num_groups=4,
    )
