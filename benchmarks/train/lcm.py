"""The latent consistency model of the embedded UNet, before its training (Luo et al., arXiv 2310.04378 and 2311.05556).

The UNet is its own teacher: weights of low rank are added to it, and learned. They, and an input for the guidance
scale, are all that is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDPMScheduler, LCMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from .corpus import NOISE_SCHEDULE

RANK, GUIDANCE_WIDTH = 16, 64
#: Timesteps between neighbouring points of a trajectory, and the range of guidance scales.
STRIDE, GUIDANCE = 50, (1.5, 5.5)
SCHEDULER = NOISE_SCHEDULE | {"clip_sample": False}


class LowRank(nn.Module):
    """A weight with a product of two small matrices added, which is zero at first."""

    def __init__(self, weight: Tensor) -> None:
        """Take the shape of a weight."""
        super().__init__()
        columns = weight[0].numel()
        self.down = nn.Parameter(torch.randn(RANK, columns) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(len(weight), RANK))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the product."""
        return weight + (self.up @ self.down).view_as(weight)


def build(teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """Copy the teacher, freeze it, and add what is to be learned."""
    made: Any = UNet2DConditionModel.from_config({**teacher.config, "time_cond_proj_dim": GUIDANCE_WIDTH})
    made.load_state_dict(teacher.state_dict(), strict=False)
    made.requires_grad_(False)
    for layer in _layers(made):
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight))
    guidance = made.time_embedding.cond_proj.requires_grad_(True)
    nn.init.zeros_(guidance.weight)
    return made


def _layers(model: nn.Module) -> Iterator[Any]:
    for name, layer in model.named_modules():
        adaptable = isinstance(layer, (nn.Linear, nn.Conv2d)) and not name.endswith("cond_proj")
        if adaptable and min(len(layer.weight), layer.weight[0].numel()) > 2 * RANK:
            yield layer


def learned(model: nn.Module) -> dict[str, Tensor]:
    """Find what was learned, by the names of layers: `NAME.down`, `NAME.up`, and the input for the guidance scale."""
    found = {name: one.detach() for name, one in model.named_parameters() if one.requires_grad}
    return {name.replace("parametrizations.weight.0.", ""): one for name, one in found.items()}


class Consistency:
    """Distance of what the model predicts from two neighbouring points of one trajectory of its teacher."""

    def __init__(self, teacher: UNet2DConditionModel, empty: Tensor, device: torch.device) -> None:
        """Freeze the teacher; take the state `(1, tokens, channels)` of the empty caption."""
        self.teacher = teacher.to(device).eval().requires_grad_(False)
        self.empty = empty.float()
        products = DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod.to(device)
        # The first is that of the data, one step before timestep 0.
        products = torch.cat([products.new_ones(1), products])
        self.data, self.noise = products.sqrt(), (1 - products).sqrt()
        self.scaling = LCMScheduler(**SCHEDULER).config.timestep_scaling

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the loss of a batch (equation 14 of arXiv 2310.04378) in squared distance."""
        latents, n = batch.latents, len(batch.latents)
        later = torch.randint(0, len(self.data) - 1, (n,), device=latents.device)
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(n, device=latents.device)
        embedding = embed(guidance)
        noisy = self._data(later) * latents + self._noise(later) * torch.randn_like(latents)
        with torch.no_grad():
            earlier = (later - STRIDE).clamp(min=-1)
            before = self._step(noisy, later, earlier, batch.hidden, guidance)
            target = self._predict(model, before, earlier, batch.hidden, embedding)
        return functional.mse_loss(self._predict(model, noisy, later, batch.hidden, embedding), target)

    def _data(self, timesteps: Tensor) -> Tensor:
        return self.data[timesteps + 1, None, None, None]

    def _noise(self, timesteps: Tensor) -> Tensor:
        return self.noise[timesteps + 1, None, None, None]

    def _step(self, noisy: Tensor, later: Tensor, earlier: Tensor, hidden: Tensor, guidance: Tensor) -> Tensor:
        """Go one step of DDIM towards the data, with the teacher's guided velocity."""
        both = torch.cat([hidden, self.empty.expand_as(hidden)])
        with torch.autocast(noisy.device.type, torch.bfloat16):
            velocity = self.teacher(noisy.repeat(2, 1, 1, 1), later.repeat(2), both).sample
        guided, free = velocity.float().chunk(2)
        guided = free + guidance[:, None, None, None] * (guided - free)
        data = self._data(later) * noisy - self._noise(later) * guided
        noise = self._data(later) * guided + self._noise(later) * noisy
        made: Tensor = self._data(earlier) * data + self._noise(earlier) * noise
        return made

    def _predict(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, hidden: Tensor, embedding: Tensor) -> Tensor:
        """Predict the data as `LCMScheduler` does; at the end of the trajectory it is what is given."""
        known = timesteps.clamp(min=0)
        # In full precision, since neighbouring points differ by about what bfloat16 rounds off.
        velocity = model(noisy, known, hidden, timestep_cond=embedding).sample
        found = self._data(timesteps) * noisy - self._noise(timesteps) * velocity
        scaled = self.scaling * known[:, None, None, None].float()
        kept = 0.25 / (scaled.square() + 0.25)
        made: Tensor = kept * noisy + scaled / (scaled.square() + 0.25).sqrt() * found
        return made


def embed(guidance: Tensor) -> Tensor:
    """Embed guidance scales as `LatentConsistencyModelPipeline` does: `(n, GUIDANCE_WIDTH)`."""
    half = GUIDANCE_WIDTH // 2
    rates = torch.exp(torch.arange(half, device=guidance.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * (guidance - 1)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
