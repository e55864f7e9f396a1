"""Train the embedded transformer by distillation: the trained UNet is its teacher, with the same data and text encoder.

`python -m benchmarks.train.dit --work DIR`, after `python -m benchmarks.train --work DIR`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, PixArtTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional

from cachekit.models.demo.pipeline import WEIGHTS, load_pipeline

from . import export, loop
from .corpus import CAPTION_DROPOUT, NOISE_SCHEDULE, Corpus, draw_timesteps
from .text import WIDTH

SECONDS = 3000.0
SNAPSHOT = "dit"
HEADS, HEAD_WIDTH, BLOCKS = 6, 32, 8


def build() -> PixArtTransformer2DModel:
    """Build the untrained transformer; every block starts as the identity, and the output as zero."""
    width = HEADS * HEAD_WIDTH
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=8,
        out_channels=8,
        num_layers=BLOCKS,
        cross_attention_dim=width,
        caption_channels=WIDTH,
        sample_size=16,
        patch_size=2,
        interpolation_scale=1,
        use_additional_conditions=False,
    )
    for table in (module.scale_shift_table for module in [model, *model.transformer_blocks]):
        nn.init.zeros_(table)
    for layer in (model.adaln_single.linear, model.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def attended(tokens: Tensor, end: int) -> Tensor:
    """Mask n x 28 tokens up to the first end token of each text, as the tokenizer does for the pipeline."""
    first = (tokens == end).int().argmax(1, keepdim=True)
    return (torch.arange(tokens.shape[1]) <= first).float()


class Teacher:
    """The trained UNet and text encoder, both frozen."""

    def __init__(self, folder: Path) -> None:
        """Load the finished model in `folder`."""
        pipe = load_pipeline(folder)
        pipe.unet.set_attn_processor(AttnProcessor())
        self.unet, self.text, self.end = pipe.unet, pipe.text_encoder, pipe.tokenizer.eos_token_id

    @torch.no_grad()
    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute n x 28 x 96 states of the text encoder, and the attention mask."""
        return self.text(tokens).last_hidden_state, attended(tokens, self.end)

    @torch.no_grad()
    def velocity(self, noisy: Tensor, timesteps: Tensor, hidden: Tensor) -> Tensor:
        """Predict the velocity with the UNet."""
        predicted: Tensor = self.unet(noisy, timesteps, encoder_hidden_states=hidden).sample
        return predicted.float()


class Learner(loop.Learner):
    """Learner of the transformer: its target is the UNet's prediction, which has less noise than the true velocity."""

    def __init__(self, work: Path, folder: Path = WEIGHTS / "unet") -> None:
        """Build the transformer, and load its teacher."""
        super().__init__()
        self.dit = build()
        self.dit.set_attn_processor(AttnProcessor())
        self.teacher = Teacher(folder)
        self.noise = DDPMScheduler(**NOISE_SCHEDULE)

    def losses(self, corpus: Corpus, n: int) -> tuple[Tensor, dict[str, float]]:
        """Compute the squared error against the teacher's velocity; the one against the true velocity is a figure."""
        latents, tokens, _ = corpus.batch(n)
        tokens = torch.where(torch.rand(n, 1) < CAPTION_DROPOUT, corpus.empty[None], tokens)
        hidden, mask = self.teacher.read(tokens)
        noise, timesteps = torch.randn_like(latents), draw_timesteps(n)
        noisy = self.noise.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            given = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask, "timestep": timesteps}
            velocity = self.dit(noisy, **given).sample.float()
            wanted = self.teacher.velocity(noisy, timesteps, hidden)
        error = functional.mse_loss(velocity, wanted)
        truth = functional.mse_loss(velocity.detach(), self.noise.get_velocity(latents, noise, timesteps))
        return error, {"teacher": error.item(), "velocity": truth.item()}


def train(work: Path, seconds: float, processes: int) -> None:
    """Train for `seconds`; the averaged weights are in work/dit.pt."""
    loop.train(work, loop.Settings("dit", Learner, seconds, SNAPSHOT, batch=16, rate=8e-4), processes)


def averaged(work: Path) -> PixArtTransformer2DModel:
    """Load the transformer with the averaged weights of the last snapshot."""
    learner = Learner(work)
    loop.load_averaged(work, SNAPSHOT, learner)
    learner.dit.set_default_attn_processor()
    return learner.dit.eval()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the UNet's training")
    parser.add_argument("--target", type=Path, default=WEIGHTS / "dit", help="folder of the finished model")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the training time")
    options = parser.parse_args()
    train(options.work, SECONDS * options.scale, options.processes)
    export.export_denoiser(averaged(options.work), options.target)


if __name__ == "__main__":
    main()
