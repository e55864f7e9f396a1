"""Pipelines whose transformer blocks attend to text and image together: SD3 and Flux."""

from __future__ import annotations

from typing import Any

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from cachekit.testing.tiny.weights import WIDTH, quiet, reproducible, seeded, vae, without_texts


@reproducible
def sd3(layers: int = 4) -> StableDiffusion3Pipeline:
    """SD3: two streams side by side, and a last block that ends the text's."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=8,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
    )
    return quiet(StableDiffusion3Pipeline(**_parts(transformer), **without_texts(3)))


@reproducible
def flux(layers: tuple[int, int] = (2, 4), guidance_embeds: bool = False) -> FluxPipeline:
    """Flux: `layers` double-stream and single-stream blocks; as dev with `guidance_embeds`, else as schnell."""
    double, single = layers
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )
    return quiet(FluxPipeline(**_parts(transformer), **without_texts(2)))


def _parts(transformer: Any) -> dict[str, Any]:
    scheduler = FlowMatchEulerDiscreteScheduler()
    return {"transformer": seeded(transformer), "vae": vae(shift_factor=0.0), "scheduler": scheduler}
