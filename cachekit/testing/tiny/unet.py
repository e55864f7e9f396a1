"""Pipelines around a UNet: Stable Diffusion, SDXL, and ControlNets beside one."""

from __future__ import annotations

from typing import Any

from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from cachekit.testing.tiny.weights import WIDTH, quiet, reproducible, seeded, vae, without_texts


@reproducible
def unet(**changes: Any) -> UNet2DConditionModel:
    """SD's structure: four resolutions, two layers each, cross-attention in all but the lowest."""
    config: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return seeded(UNet2DConditionModel(**{**config, **changes}))


@reproducible
def sd(**changes: Any) -> StableDiffusionPipeline:
    """Stable Diffusion with SD's four resolutions; `changes` are of the UNet's config."""
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return quiet(
        StableDiffusionPipeline(
            vae=vae(),
            unet=unet(**changes),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **without_texts(1),
        )
    )


def small(**changes: Any) -> StableDiffusionPipeline:
    """SD with two resolutions: for tests that do not need all of its branches."""
    blocks = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return sd(**blocks, **changes)


@reproducible
def controlled(nets: int = 1) -> StableDiffusionControlNetPipeline:
    """`small` with ControlNets, each with weights of its own."""
    parts = small().components
    made = [
        seeded(ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16)), seed)
        for seed in range(1, nets + 1)
    ]
    controlnet = made[0] if nets == 1 else made
    return quiet(StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False))


@reproducible
def sdxl() -> StableDiffusionXLPipeline:
    """SDXL's structure: three resolutions, added conditions, and two transformer layers in the lowest."""
    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=WIDTH,
        attention_head_dim=(2, 2, 4),
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        use_linear_projection=True,
    )
    scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    return quiet(
        StableDiffusionXLPipeline(
            vae=vae(),
            unet=seeded(model),
            scheduler=scheduler,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
            **without_texts(2),
        )
    )
