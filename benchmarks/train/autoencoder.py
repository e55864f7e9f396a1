"""Train the autoencoder: 64 x 64 x 3 images to 16 x 16 x 8 latents of unit variance, and back."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cachekit.models.demo import scenes
from cachekit.models.demo.checker import shows

from .data import load_captions, load_images
from .parallel import agree, average_gradients, launch

CROP = 32
LATENT_NOISE = 0.05
LATENT_STD = 0.5


def build() -> AutoencoderTiny:
    """Build the untrained autoencoder."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        latent_channels=8,
        num_encoder_blocks=(1, 1, 3),
        num_decoder_blocks=(3, 1, 1),
        scaling_factor=LATENT_STD,
    )


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """Convert n x h x w x 3 bytes to n x 3 x h x w in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def crops(images: NDArray[np.uint8], captions: list[str], batch: int, rng: np.random.Generator) -> Tensor:
    """Cut out windows around things: whole quarters, shifted by up to 8 pixels."""
    found = []
    for index in rng.integers(len(images), size=batch):
        thing = rng.choice(np.array([thing.place for thing in scenes.parse(captions[index]).things]))
        rows, columns = scenes.quarter(str(thing))
        top = int(np.clip(rows.start + rng.integers(-8, 9), 0, scenes.IMAGE_SIZE - CROP))
        left = int(np.clip(columns.start + rng.integers(-8, 9), 0, scenes.IMAGE_SIZE - CROP))
        found.append(images[index, top : top + CROP, left : left + CROP])
    return to_tensor(np.stack(found))


class Normaliser(nn.Module):
    """Normalises latents to zero mean and unit variance per channel, and averages the statistics."""

    def __init__(self, channels: int) -> None:
        """Start without statistics."""
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, eps=1e-6, affine=False, momentum=0.02)

    def forward(self, latents: Tensor) -> Tensor:
        """Normalise n x c x h x w latents by the batch (in training) or by the averaged statistics."""
        normal: Tensor = self.norm(latents.float())
        return normal

    @torch.no_grad()
    def fold_into(self, convolution: nn.Conv2d) -> None:
        """Fold the normalisation into the encoder's last convolution."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        assert convolution.bias is not None
        scale = 1 / (variance + self.norm.eps).sqrt()
        convolution.weight.mul_(scale[:, None, None, None])
        convolution.bias.sub_(mean).mul_(scale)


def _loss(model: AutoencoderTiny, normaliser: Normaliser, pixels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        latents = normaliser(model.encoder(pixels))
        decoded = model.decoder(latents + LATENT_NOISE * torch.randn_like(latents)).float()
    return functional.l1_loss(decoded, pixels) + 4 * functional.mse_loss(decoded, pixels)


def _begin(work: Path) -> AutoencoderTiny:
    """Load the autoencoder of an earlier round, whose latents are normalised already, or build a new one."""
    if (work / "autoencoder").exists():
        model: AutoencoderTiny = AutoencoderTiny.from_pretrained(work / "autoencoder")
        return model.train()
    return build()


def _train(rank: int, world: int, work: Path, seconds: float, rate: float, batch: int) -> None:
    """Train for `seconds`; the first process writes the result."""
    torch.manual_seed(1)
    model, normaliser = _begin(work), Normaliser(8)
    both = nn.ModuleList([model, normaliser])
    images, captions = load_images(work), load_captions(work)
    seed = int(rate * 1e6) + rank
    rng = np.random.default_rng([1, seed])
    torch.manual_seed(seed)
    optimiser = torch.optim.AdamW(both.parameters(), lr=0, weight_decay=1e-4, betas=(0.9, 0.99))
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * 0.5 * (1 + np.cos(np.pi * done))
        loss = _loss(model, normaliser, crops(images, captions, batch, rng))
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        average_gradients(both, world)
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        step += 1
        done = agree((time.monotonic() - start) / seconds)
        if rank == 0 and step % 100 == 0:
            print(f"autoencoder step {step} at {100 * done:.0f} %: loss {loss.item():.4f}", flush=True)
    if rank == 0:
        _save(model, normaliser, work / "autoencoder")


def _save(model: AutoencoderTiny, normaliser: Normaliser, folder: Path) -> None:
    copy = build()
    copy.load_state_dict(model.state_dict())
    last = copy.encoder.layers[-1]
    assert isinstance(last, nn.Conv2d)
    normaliser.fold_into(last)
    copy.save_pretrained(folder)


def train(work: Path, seconds: float, rate: float, processes: int, batch: int = 48) -> None:
    """Train one round of `seconds`, from work/autoencoder where that exists, and write it there."""
    launch(processes, _train, work, seconds, rate, batch)


@torch.no_grad()
def reconstruction(model: AutoencoderTiny, count: int = 300) -> dict[str, float]:
    """Measure the share of held-out scenes that pass the checker after encoding and decoding, and the PSNR (dB)."""
    rng = np.random.default_rng(5)
    captions = scenes.heldout_captions(count, seed=5)
    images = scenes.render_batch([scenes.parse(text) for text in captions], rng)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
    latents = model.encode(pixels).latents
    decoded = (model.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    passed = [bool(shows(image, text)) for image, text in zip(decoded, captions, strict=True)]
    psnr = -10 * np.log10(((decoded - images) ** 2).mean())
    return {"n": count, "shown": float(np.mean(passed)), "psnr": float(psnr)}


@torch.no_grad()
def _encode(rank: int, world: int, work: Path, folder: str) -> None:
    model = AutoencoderTiny.from_pretrained(work / folder)
    images = load_images(work)
    latents = np.load(work / "latents.npy", mmap_mode="r+")
    for start in range(rank * 250, len(images), world * 250):
        with torch.autocast("cpu", torch.bfloat16):
            encoded = model.encode(to_tensor(images[start : start + 250])).latents
        latents[start : start + 250] = encoded.float().numpy()
    latents.flush()


def encode_all(work: Path, processes: int, folder: str = "autoencoder") -> None:
    """Encode the whole training set to latents.npy: n x 8 x 16 x 16 half floats of unit variance."""
    shape = (len(load_images(work)), 8, 16, 16)
    np.lib.format.open_memmap(work / "latents.npy", "w+", np.float16, shape).flush()
    launch(processes, _encode, work, folder)
