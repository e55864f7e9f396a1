"""Pipelines around one chain of transformer blocks: PixArt with cross-attention, and DiT with class labels."""

from __future__ import annotations

from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from cachekit.testing.tiny.weights import WIDTH, quiet, reproducible, seeded, vae, without_texts


@reproducible
def pixart(sigma: bool = False, layers: int = 3) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    """PixArt-alpha, or PixArt-sigma."""
    transformer = PixArtTransformer2DModel(
        sample_size=16,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=16,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False if sigma else None,
    )
    cls = PixArtSigmaPipeline if sigma else PixArtAlphaPipeline
    return quiet(cls(**without_texts(1), vae=vae(), transformer=seeded(transformer), scheduler=DDIMScheduler()))


@reproducible
def dit() -> DiTPipeline:
    """DiT with three blocks and a thousand classes."""
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=3,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
    )
    return quiet(DiTPipeline(transformer=seeded(transformer), vae=vae(), scheduler=DDIMScheduler()))
