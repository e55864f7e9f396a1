"""Pipelines of videos: SVD around a UNet, and Wan around one transformer or two."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from cachekit.testing.tiny.weights import WIDTH, quiet, reproducible, seeded, without_texts


@reproducible
def svd() -> StableVideoDiffusionPipeline:
    """SVD, which is given an image and no text."""
    model = UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=4,
        projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32,
    )
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            projection_dim=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            intermediate_size=16,
            patch_size=8,
        )
    )
    decoder = AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        interpolation_type="linear",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
    )
    return quiet(
        StableVideoDiffusionPipeline(
            vae=decoder.eval(),
            image_encoder=encoder.eval(),
            unet=seeded(model),
            scheduler=scheduler,
            feature_extractor=CLIPImageProcessor(crop_size=16, size=16),
        )
    )


@reproducible
def wan_transformer(seed: int = 0, layers: int = 4) -> WanTransformer3DModel:
    """Wan's transformer with the weights of `seed`."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=8,
        ffn_dim=16,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return seeded(transformer, seed)


@reproducible
def wan(layers: int = 4, boundary: float | None = None) -> WanPipeline:
    """Wan, which calls its transformer once for each guidance branch; it has no autoencoder and gives latents.

    With `boundary` it has a second transformer, for timesteps below that part of the noise schedule.
    """
    second: dict[str, Any] = {}
    if boundary:
        second = {"transformer_2": wan_transformer(1, layers), "boundary_ratio": boundary}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    first = wan_transformer(0, layers)
    return quiet(WanPipeline(**without_texts(1), vae=None, transformer=first, scheduler=scheduler, **second))
