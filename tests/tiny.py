"""Real diffusers pipelines of tiny size with seeded weights; nothing is downloaded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
    UNet2DConditionModel,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from cachekit.pipelines import denoiser_of

TOKENS, WIDTH = 7, 16


def reproducible(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make `make` draw the same random numbers at every call, and leave the global generator alone."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make(*args, **kwargs)

    return made


def seeded(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw all weights anew, large enough that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


@reproducible
def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=[8, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


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
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        unet=unet(**changes),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def small(**changes: Any) -> StableDiffusionPipeline:
    """SD with two resolutions: for tests that do not need all of its branches."""
    blocks = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return sd(**blocks, **changes)


@reproducible
def sdxl() -> StableDiffusionXLPipeline:
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
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=seeded(model),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@reproducible
def pixart(sigma: bool = False, layers: int = 3) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
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
    pipe = cls(tokenizer=None, text_encoder=None, vae=vae(), transformer=seeded(transformer), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@reproducible
def dit() -> DiTPipeline:
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
    pipe = DiTPipeline(transformer=seeded(transformer), vae=vae(), scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@reproducible
def svd() -> StableVideoDiffusionPipeline:
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
    pipe = StableVideoDiffusionPipeline(
        vae=decoder.eval(),
        image_encoder=encoder.eval(),
        unet=seeded(model),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            interpolation_type="linear",
            timestep_type="continuous",
            sigma_min=0.002,
            sigma_max=700.0,
            use_karras_sigmas=True,
        ),
        feature_extractor=CLIPImageProcessor(crop_size=16, size=16),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def text(batch: int, width: int = WIDTH, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, TOKENS, width, generator=torch.Generator().manual_seed(seed))


def arguments(pipe: Any, steps: int = 6, batch: int = 1, guidance: float = 5.0, seed: int = 0) -> dict[str, Any]:
    """Return the arguments of a call that gives latents, for any pipeline made here."""
    generator = torch.Generator().manual_seed(seed)
    common = {"num_inference_steps": steps, "generator": generator}
    name = type(pipe).__name__
    if name == "StableVideoDiffusionPipeline":
        image = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(9))
        sizes = {"height": 16, "width": 16, "num_frames": 2, "output_type": "latent"}
        return {**common, **sizes, "image": image, "max_guidance_scale": guidance, "min_guidance_scale": 1.0}
    if name == "DiTPipeline":
        return {**common, "class_labels": list(range(batch)), "guidance_scale": guidance, "output_type": "pt"}
    given: dict[str, Any] = {**common, "guidance_scale": guidance, "output_type": "latent"}
    given |= {"prompt_embeds": text(batch), "negative_prompt_embeds": text(batch, seed=4)}
    if name.startswith("StableDiffusionXL"):
        given |= {"pooled_prompt_embeds": text(batch)[:, 0], "negative_pooled_prompt_embeds": text(batch, seed=4)[:, 0]}
    if name.startswith("PixArt"):
        mask = torch.ones(batch, TOKENS)
        mask[:, 5:] = 0
        given |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": torch.ones(batch, TOKENS)}
        given |= {"negative_prompt": None, "use_resolution_binning": False}
        given |= {"height": pipe.vae_scale_factor * 16, "width": pipe.vae_scale_factor * 16}
    return given


def latents(pipe: Any, **changes: Any) -> torch.Tensor:
    """Return what the pipeline gives for `arguments(pipe, ...)`, as a tensor."""
    known = {key: changes.pop(key) for key in ("steps", "batch", "guidance", "seed") if key in changes}
    output = pipe(**{**arguments(pipe, **known), **changes})
    # The DiTPipeline of older releases of diffusers gives an array, whatever is asked for.
    return torch.as_tensor(output.frames if hasattr(output, "frames") else output.images)


class TgateByHand:
    """TGATE written out for a denoiser of its own: every `attn2` gives `kept` where `mode` is "reuse"."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        self.mode = ""
        self.kept: dict[str, torch.Tensor] = {}
        for name, module in denoiser.named_modules():
            if name.endswith(".attn2"):
                module.forward = functools.partial(self.stand_in, name, module.forward)

    def stand_in(self, name: str, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.mode == "reuse":
            return self.kept[name]
        output = original(*args, **kwargs)
        if self.mode == "keep the mean":
            self.kept[name] = sum(output.chunk(2)) / 2
        if self.mode == "keep":
            self.kept[name] = output
        return output


def guide(both: torch.Tensor, scale: float = 5.0) -> torch.Tensor:
    """Return the guided prediction from the unconditional and the conditional half."""
    u, c = both.chunk(2)
    return u + scale * (c - u)


def cut(value: Any, half: int) -> Any:
    """Return one half of every tensor in `value`."""
    if isinstance(value, torch.Tensor) and value.dim():
        return value.chunk(2)[half]
    if isinstance(value, dict):
        # Masks are of images, whose branches share them.
        return {key: item if key == "ip_adapter_masks" else cut(item, half) for key, item in value.items()}
    return type(value)(cut(item, half) for item in value) if isinstance(value, (list, tuple)) else value


def narrowed_by_hand(pipe: Any, m: int, half: int, gated: bool = False) -> Any:
    """Return `pipe` with a denoiser that from call m on runs one half of its inputs, and TGATE if `gated`."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    attention = TgateByHand(denoiser) if gated else None
    whole, calls = denoiser.forward, 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if attention:
            attention.mode = "reuse" if calls > m else "keep the mean" if calls == m else ""
        if calls <= m:
            return whole(*args, **kwargs)
        return tuple(torch.cat([part] * 2) for part in whole(*cut(args, half), **cut(kwargs, half)))

    denoiser.forward = forward
    return pipe


def content(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else ()
    return id(value), [(key, id(item)) for key, item in items]


def state_of(pipe: Any) -> Any:
    """Return the identity of everything that a pipeline and the modules of its denoiser hold."""
    modules = [pipe, *denoiser_of(pipe).modules()]
    return [(type(module), {key: content(value) for key, value in vars(module).items()}) for module in modules]


@contextmanager
def leaves_no_trace(pipe: Any) -> Iterator[None]:
    """Check that what happens within leaves pipeline and denoiser exactly as they were."""
    before = state_of(pipe)
    yield
    assert state_of(pipe) == before
