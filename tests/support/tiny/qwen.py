"""A tiny Qwen-Image pipeline, without autoencoder and text encoder."""

from __future__ import annotations

from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

from cachekit.testing.tiny.weights import WIDTH, seeded


def qwen():
    """Build the pipeline."""
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": FlowMatchEulerDiscreteScheduler()}
    return QwenImagePipeline(transformer=seeded(transformer), **parts)
