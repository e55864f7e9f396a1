"""Train a denoiser further, or the flow model from scratch, with text encoder and autoencoder as they are.

    python -m benchmarks.train.denoisers prepare --work DIR                # scenes, latents and tokens
    python -m benchmarks.train.denoisers flow --work DIR --seconds 300     # or unet, dit, lcm (from unet)

Meant for a GPU, where each step is one CUDA graph, and 300 seconds are more than a million images; a CPU serves too.
The averaged weights go to `--target` every minute and at the end, as they are shipped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cachekit.models.demo.pipeline import WEIGHTS, demo_pipeline, load_pipeline

from . import data, export, flow, lcm
from .autoencoder import LATENT_STD, to_tensor
from .corpus import CAPTION_DROPOUT, NOISE_SCHEDULE, draw_timesteps, weigh
from .dit import attended
from .muon import Muon
from .text import tokenize

IMAGES = 400_000
KINDS = ("unet", "dit", "flow", "lcm")
#: Share of the training after which the rate falls, down to 0 at the end, and the average begins anew.
CONSTANT = 0.5
WARM_UP, DECAY = 100, 0.999
ADAM_RATE = {"unet": 5e-4, "dit": 5e-4, "flow": 1e-3, "lcm": 1e-4}
MUON_RATE = {"dit": 0.01, "flow": 0.02}


# -- data -------------------------------------------------------------------------------------------------


def prepare(work: Path, count: int, processes: int, device: torch.device) -> None:
    """Render scenes, and write their latents, tokens and weights to work/prepared.pt."""
    work.mkdir(parents=True, exist_ok=True)
    data.render_all(work, count, processes)
    shared = demo_pipeline("unet")
    captions = data.load_captions(work)
    weights = torch.tensor([weigh(text) for text in captions], dtype=torch.float64)
    prepared = {
        "latents": encode(shared.vae.to(device), data.load_images(work), device),
        "tokens": tokenize(shared.tokenizer, captions),
        "empty": tokenize(shared.tokenizer, [""]),
        "chances": weights.cumsum(0) / weights.sum(),
    }
    torch.save(prepared, work / "prepared.pt")


@torch.no_grad()
def encode(vae: Any, images: np.ndarray, device: torch.device, batch: int = 1000) -> Tensor:
    """Encode images to `(n, 8, 16, 16)` half-precision latents of unit variance."""
    found = []
    with torch.autocast(device.type, torch.bfloat16):
        for start in range(0, len(images), batch):
            pixels = to_tensor(images[start : start + batch]).to(device)
            found.append(vae.encode(pixels).latents.half().cpu())
    return torch.cat(found)


@dataclass
class Batch:
    """Latents `(n, 8, 16, 16)`, states of the text `(n, 28, 96)`, its mask `(n, 28)` and pooled state `(n, 96)`."""

    latents: Tensor
    hidden: Tensor
    mask: Tensor
    pooled: Tensor


class Captions:
    """States of the text encoder for all captions, the empty one last."""

    def __init__(self, kind: str, tokens: Tensor, device: torch.device) -> None:
        """Run the text encoder that the pipeline of this kind has."""
        from cachekit.models.demo.variants import projecting

        shared = demo_pipeline("unet")
        encoder = shared.text_encoder if kind != "flow" else projecting(shared.text_encoder)
        found = [self._read(kind, encoder.to(device), part.to(device)) for part in torch.split(tokens, 4000)]
        self.hidden, self.pooled = (torch.cat(parts) for parts in zip(*found))
        self.mask = attended(tokens, shared.tokenizer.eos_token_id).to(device)

    @torch.no_grad()
    def _read(self, kind: str, encoder: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
        output = encoder(tokens, output_hidden_states=True)
        if kind == "flow":
            return output.hidden_states[-2].half(), output.text_embeds.half()
        return output.last_hidden_state.half(), output.pooler_output.half()


class Corpus:
    """Source of random batches, all on the device, without waiting for the host."""

    def __init__(self, work: Path, kind: str, device: torch.device) -> None:
        """Load what `prepare` wrote."""
        found = torch.load(work / "prepared.pt", weights_only=True)
        self.latents, self.chances = found["latents"].to(device), found["chances"].to(device)
        self.captions = Captions(kind, torch.cat([found["tokens"], found["empty"]]), device)

    def batch(self, n: int) -> Batch:
        """Sample scenes by weight; of some the caption is dropped."""
        device = self.latents.device
        chosen = torch.searchsorted(self.chances, torch.rand(n, device=device, dtype=torch.float64))
        chosen = chosen.clamp(max=len(self.latents) - 1)
        dropped = torch.rand(n, device=device) < CAPTION_DROPOUT
        texts = torch.where(dropped, len(self.latents), chosen)
        found = self.captions
        return Batch(
            latents=self.latents[chosen].float() * LATENT_STD,
            hidden=found.hidden[texts].float(),
            mask=found.mask[texts],
            pooled=found.pooled[texts].float(),
        )


# -- losses -----------------------------------------------------------------------------------------------


class Velocity:
    """Squared error of the velocity, for a denoiser of `NOISE_SCHEDULE`."""

    def __init__(self, device: torch.device) -> None:
        """Compute the shares of data and noise at each timestep."""
        from diffusers import DDPMScheduler

        products = DDPMScheduler(**NOISE_SCHEDULE).alphas_cumprod.to(device)
        self.data, self.noise = products.sqrt(), (1 - products).sqrt()

    def __call__(self, model: nn.Module, batch: Batch, **given: Tensor) -> Tensor:
        """Compute the loss of a batch; `given` are further arguments of the model."""
        latents, noise = batch.latents, torch.randn_like(batch.latents)
        timesteps = draw_timesteps(len(latents), latents.device)
        data, share = self.data[timesteps, None, None, None], self.noise[timesteps, None, None, None]
        with torch.autocast(latents.device.type, torch.bfloat16):
            given |= {"encoder_hidden_states": batch.hidden, "timestep": timesteps}
            velocity = model(data * latents + share * noise, **given).sample
        return functional.mse_loss(velocity.float(), data * noise - share * latents)


def loss_of(kind: str, device: torch.device) -> Callable[[nn.Module, Batch], Tensor]:
    """Choose the loss of a kind of model that has no teacher."""
    if kind == "flow":

        def rectified(model: nn.Module, batch: Batch) -> Tensor:
            # The pipeline has two text encoders side by side, here the same one twice.
            return flow.loss(model, batch.latents, batch.hidden.repeat(1, 1, 2), batch.pooled.repeat(1, 2))

        return rectified
    velocity = Velocity(device)
    if kind == "unet":
        return velocity
    return lambda model, batch: velocity(model, batch, encoder_attention_mask=batch.mask)


# -- training ---------------------------------------------------------------------------------------------


def build(kind: str) -> nn.Module:
    """Load the shipped model, or build the untrained flow model where none is shipped."""
    if kind == "flow" and not (WEIGHTS / "flow" / "transformer").is_dir():
        made: nn.Module = flow.build()
        return made
    pipe = load_pipeline(WEIGHTS / kind)
    found: nn.Module = pipe.unet if kind == "unet" else pipe.transformer
    return found.requires_grad_(True)


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix of a transformer's blocks, other than of their modulation."""
    return parameter.ndim == 2 and name.startswith("transformer_blocks") and "norm" not in name and "table" not in name


class Training:
    """Training of one model for a time, with an average of its weights."""

    def __init__(self, kind: str, corpus: Corpus, batch: int, device: torch.device) -> None:
        """Make the optimisers: Muon for the matrices of a transformer's blocks, AdamW for the rest."""
        self.kind, self.corpus, self.size, self.device = kind, corpus, batch, device
        self.model: nn.Module
        self.loss: Callable[[nn.Module, Batch], Tensor]
        if kind == "lcm":
            teacher = load_pipeline(WEIGHTS / "unet").unet
            self.model = lcm.build(teacher).to(device).train()
            self.loss = lcm.Consistency(teacher, corpus.captions.hidden[-1:], device)
        else:
            self.model, self.loss = build(kind).to(device).train(), loss_of(kind, device)
        named = {name: one for name, one in self.model.named_parameters() if one.requires_grad}
        matrices = {name for name, one in named.items() if kind in MUON_RATE and is_block_matrix(name, one)}
        self.rates = [torch.zeros((), device=device), torch.zeros((), device=device)]
        on_gpu = device.type == "cuda"
        rest = [one for name, one in named.items() if name not in matrices]
        adam = torch.optim.AdamW(
            rest, lr=self.rates[0], weight_decay=1e-3, betas=(0.9, 0.95), fused=on_gpu, capturable=on_gpu, foreach=False
        )
        self.optimisers: list[Any] = [adam]
        if matrices:
            self.optimisers.append(Muon([named[name] for name in sorted(matrices)], self.rates[1]))
        self.parameters = list(named.values())
        self.average = [one.detach().clone() for one in self.parameters]
        self.total = torch.zeros((), device=device)
        self.steps = 0

    def step(self) -> None:
        """Do one step of the optimisers, on the device alone."""
        for one in self.parameters:
            one.grad = None
        loss = self.loss(self.model, self.corpus.batch(self.size))
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for optimiser in self.optimisers:
            optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [*self.parameters], 1 - DECAY)
            self.total += loss.detach()

    def captured(self) -> Callable[[], None]:
        """Capture a step as a CUDA graph, after a few steps outside of it; on a CPU a step as it is."""
        if self.device.type != "cuda":
            return self.step
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(5):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph.replay

    def set_rates(self, done: float) -> None:
        """Set the learning rates: rising, constant, and falling to 0 in the last part."""
        factor = min(1.0, (self.steps + 1) / WARM_UP, (1 - done) / (1 - CONSTANT))
        for rate, table in zip(self.rates, (ADAM_RATE, MUON_RATE)):
            rate.fill_(factor * table.get(self.kind, 0.0))

    def run(self, seconds: float, save: Callable[[nn.Module], None], every: int = 50) -> None:
        """Train for `seconds`, and save the averaged model every minute and at the end."""
        self.set_rates(0.0)
        step, begun, saved, restarted = self.captured(), time.monotonic(), time.monotonic(), False
        done = 0.0
        while done < 1:
            for _ in range(every):
                self.set_rates(done)
                step()
                self.steps += 1
            loss = self.total.item() / every
            self.total.zero_()
            done = (time.monotonic() - begun) / seconds
            if done > CONSTANT and not restarted:
                restarted = True
                self._copy(self.parameters, self.average)
            if self.steps % (10 * every) == 0 or done >= 1:
                speed = self.steps * self.size / (time.monotonic() - begun)
                print(f"{self.kind} step {self.steps} at {100 * done:.0f} %: loss {loss:.4f} {speed:.0f}/s", flush=True)
            if time.monotonic() - saved > 60 or done >= 1:
                saved = time.monotonic()
                save(self.averaged())

    def averaged(self) -> nn.Module:
        """Make a copy of the model with the averaged weights, on the CPU."""
        import copy

        made: nn.Module = copy.deepcopy(self.model).cpu().eval()
        self._copy(self.average, [one for one in made.parameters() if one.requires_grad])
        return made

    @staticmethod
    @torch.no_grad()
    def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
        for one, other in zip(source, target, strict=True):
            other.copy_(one)


def train(kind: str, work: Path, target: Path, seconds: float, batch: int, device: torch.device) -> None:
    """Train one model, and export it to `target`."""
    torch.manual_seed(5)
    torch.set_float32_matmul_precision("high")
    training = Training(kind, Corpus(work, kind, device), batch, device)
    training.run(seconds, lambda model: export.export_denoiser(model, target))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prepare", *KINDS])
    parser.add_argument("--work", type=Path, required=True, help="folder of the data (about 7 GB)")
    parser.add_argument("--target", type=Path, help="folder of the finished model; default: where it is shipped")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.what == "prepare":
        prepare(options.work, options.images, options.processes, device)
    else:
        target = options.target or WEIGHTS / options.what
        train(options.what, options.work, target, options.seconds, options.batch, device)


if __name__ == "__main__":
    main()
