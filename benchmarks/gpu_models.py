"""The models of `python -m benchmarks.gpu`: true sizes with random weights, and small ones to try the command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from cachekit.models.architectures import Architecture, architecture
from cachekit.models.loading import scheduler_for
from cachekit.tools.bench.measuring import Stopwatch
from cachekit.tools.bench.peers import counting
from cachekit.tools.bench.untrained import untrained_pipeline, untrained_text
from cachekit.upstream.pipelines import denoiser_of


@dataclass(frozen=True)
class Case:
    """How a model is run, and what is changed in its architecture to make it small."""

    steps: int
    guidance: float
    #: Another scheduler than the one of its noise schedule.
    scheduler: str = ""
    #: Fields of the architecture that the run needs, such as the frames of a shorter video.
    fields: dict[str, Any] = field(default_factory=dict)
    tiny: dict[str, Any] = field(default_factory=dict)
    tiny_config: dict[str, Any] = field(default_factory=dict)


_TINY_TEXT = {"tokens": 8, "text_width": 32}
CASES = {
    "sdxl": Case(
        steps=25,
        guidance=5.0,
        scheduler="euler",
        tiny={**_TINY_TEXT, "latent": 16},
        tiny_config={
            "block_out_channels": [32, 64, 64],
            "attention_head_dim": [1, 2, 2],
            "transformer_layers_per_block": [1, 1, 1],
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
            "sample_size": 16,
        },
    ),
    "flux": Case(
        steps=28,
        guidance=3.5,
        tiny={**_TINY_TEXT, "latent": 8},
        tiny_config={
            "attention_head_dim": 16,
            "axes_dims_rope": [4, 4, 8],
            "joint_attention_dim": 32,
            "num_attention_heads": 2,
            "num_layers": 2,
            "num_single_layers": 2,
            "pooled_projection_dim": 32,
        },
    ),
    "sd3": Case(
        steps=28,
        guidance=4.5,
        tiny={**_TINY_TEXT, "latent": 16},
        tiny_config={
            "attention_head_dim": 16,
            "caption_projection_dim": 32,
            "dual_attention_layers": [0, 1],
            "joint_attention_dim": 32,
            "num_attention_heads": 2,
            "num_layers": 4,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 16,
            "sample_size": 16,
        },
    ),
    "pixart-alpha": Case(
        steps=20,
        guidance=4.5,
        scheduler="dpm++",
        tiny={**_TINY_TEXT, "latent": 16},
        tiny_config={
            "attention_head_dim": 16,
            "caption_channels": 32,
            "cross_attention_dim": 32,
            "num_attention_heads": 2,
            "num_layers": 4,
            "sample_size": 16,
            "use_additional_conditions": False,
        },
    ),
    "wan": Case(
        steps=20,
        guidance=5.0,
        fields={"frames": 5},
        tiny={**_TINY_TEXT, "latent": 8, "latent_width": 8, "frames": 2},
        tiny_config={
            "attention_head_dim": 12,
            "ffn_dim": 32,
            "freq_dim": 16,
            "num_attention_heads": 2,
            "num_layers": 4,
            "text_dim": 32,
        },
    ),
}
_TINY_STEPS = 8
#: Steps of the run before the first timed one. Solvers of second order need two.
_WARM_UP = 2


@dataclass
class Run:
    """Latents of one run, its seconds, and the bytes that it needed at most beyond what was allocated before it."""

    latents: torch.Tensor
    seconds: float
    extra_bytes: int | None


def known_of(name: str, tiny: bool) -> Architecture:
    """Architecture of a model as it is run, or of the small one in its place."""
    case, known = CASES[name], replace(architecture(name), **CASES[name].fields)
    return replace(known, config={**known.config, **case.tiny_config}, **case.tiny) if tiny else known


def steps_of(name: str, tiny: bool) -> int:
    """Find the number of steps of a run."""
    return _TINY_STEPS if tiny else CASES[name].steps


class Model:
    """A pipeline with random weights in bfloat16 on its device, and how long it takes without any cache."""

    def __init__(self, name: str, device: str, tiny: bool) -> None:
        """Build the model; it isn't run."""
        self.name, self.device = name, device
        self.steps, self._tiny = steps_of(name, tiny), tiny
        self.known = known_of(name, tiny)
        self.pipe = self.fresh()
        #: Seconds of all timed runs without a cache.
        self.plain_seconds: list[float] = []
        #: MACs of Linear and convolution layers in the run without a cache.
        self.macs = 0

    def fresh(self) -> Any:
        """Build the pipeline anew, with the same weights."""
        pipe = untrained_pipeline(self.known, self.device, torch.bfloat16)
        if CASES[self.name].scheduler:
            pipe.scheduler = scheduler_for(pipe, CASES[self.name].scheduler)
        pipe.to(self.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def arguments(self, steps: int | None = None) -> dict[str, Any]:
        """Make the arguments of a run that gives latents."""
        known, side = self.known, self.known.pixels_per_latent
        video = {"num_frames": 4 * (known.frames - 1) + 1} if known.cls.startswith("Wan") else {}
        return {
            **untrained_text(known, 1, self.device, torch.bfloat16),
            "height": known.latent * side,
            "width": (known.latent_width or known.latent) * side,
            "num_inference_steps": steps or self.steps,
            "guidance_scale": CASES[self.name].guidance,
            "output_type": "latent",
            **video,
        }

    @cached_property
    def plain(self) -> Run:
        """Run without a cache, after a short one that warms up and is counted: all of its steps are alike."""
        self.macs = self.counted(self.pipe, self.pipe, steps=_WARM_UP) * self.steps // _WARM_UP
        return self.timed_plain()

    def timed_plain(self) -> Run:
        """Time another run without a cache."""
        made = self.run(self.pipe)
        self.plain_seconds.append(made.seconds)
        return made

    def counted(self, pipe: Any, call: Callable[..., Any], steps: int | None = None, **more: Any) -> int:
        """Count the MACs of a run of `pipe`; the run warms up, too."""
        with counting(denoiser_of(pipe)) as count:
            self.run(call, steps, **more)
        return count.macs

    def run(self, call: Callable[..., Any], steps: int | None = None, **more: Any) -> Run:
        """Run the pipeline once with a fixed seed, and time it."""
        generator, arguments = torch.Generator().manual_seed(0), self.arguments(steps)
        before = torch.cuda.memory_allocated() if self.device != "cpu" else 0
        with Stopwatch(torch.device(self.device)) as watch:
            latents = call(**arguments, generator=generator, **more)[0]
        extra = None if watch.peak_memory is None else watch.peak_memory - before
        return Run(latents, watch.seconds, extra)
