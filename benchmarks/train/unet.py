"""Train the UNet and the text encoder on cached latents: v-prediction, captions dropped for guidance."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel

from . import loop
from .corpus import CAPTION_DROPOUT, NOISE_SCHEDULE, Corpus, draw_timesteps
from .text import WIDTH, Heads, targets

HEADS_WEIGHT = 0.02
SNAPSHOT = "snapshot"


def build() -> UNet2DConditionModel:
    """Build the untrained UNet: 16 x 16, 8 x 8 and 4 x 4, cross-attention at the two lower resolutions."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


class Learner(loop.Learner):
    """Learner of the UNet and the text encoder together."""

    def __init__(self, work: Path) -> None:
        """Build the UNet, and load the text encoder and its heads from their own training."""
        super().__init__()
        self.unet = build()
        self.unet.set_attn_processor(AttnProcessor())
        self.text = CLIPTextModel.from_pretrained(work / "text_encoder")
        self.heads = Heads()
        self.heads.load_state_dict(torch.load(work / "heads.pt", weights_only=True))
        self.noise = DDPMScheduler(**NOISE_SCHEDULE)

    def losses(self, corpus: Corpus, n: int) -> tuple[Tensor, dict[str, float]]:
        """Compute the squared error of the velocity plus a small share of the text heads' loss, and each alone."""
        latents, tokens, captions = corpus.batch(n)
        hidden = self.text(tokens).last_hidden_state
        aside = self.heads(hidden, *targets(captions))
        empty = self.text(corpus.empty[None]).last_hidden_state
        hidden = torch.where(torch.rand(n, 1, 1) < CAPTION_DROPOUT, empty, hidden)
        noise, timesteps = torch.randn_like(latents), draw_timesteps(n)
        noisy = self.noise.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16):
            velocity = self.unet(noisy, timesteps, encoder_hidden_states=hidden).sample
        error = functional.mse_loss(velocity.float(), self.noise.get_velocity(latents, noise, timesteps))
        return error + HEADS_WEIGHT * aside, {"velocity": error.item(), "text": aside.item()}


def train(work: Path, seconds: float, processes: int) -> None:
    """Train for `seconds`; the averaged weights are in work/snapshot.pt."""
    loop.train(work, loop.Settings("unet", Learner, seconds, SNAPSHOT), processes)


def averaged(work: Path) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Load the UNet and the text encoder with the averaged weights of the last snapshot."""
    learner = Learner(work)
    loop.load_averaged(work, SNAPSHOT, learner)
    learner.unet.set_default_attn_processor()
    return learner.unet.eval(), learner.text.eval()
