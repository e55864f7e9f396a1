"""Tiny diffusers pipelines with seeded weights, calls of them, and what tests compare them with.

Nothing is downloaded. Each builder gives the same weights at every call.
"""

from __future__ import annotations

from cachekit.testing.tiny.calls import arguments, latents, picture, text
from cachekit.testing.tiny.dit import dit, pixart
from cachekit.testing.tiny.joint import flux, sd3
from cachekit.testing.tiny.unet import controlled, sd, sdxl, small, unet
from cachekit.testing.tiny.video import svd, wan, wan_transformer
from cachekit.testing.tiny.weights import TOKENS, WIDTH, reproducible, seeded, vae
from cachekit.upstream.pipelines import denoiser_of
from support.tiny.by_hand import TgateByHand, cut, guide, narrowed_by_hand
from support.tiny.qwen import qwen
from support.tiny.sharing import sharing, uncached
from support.tiny.traces import leaves_no_trace, state_of

__all__ = [
    "TOKENS",
    "WIDTH",
    "TgateByHand",
    "arguments",
    "controlled",
    "cut",
    "denoiser_of",
    "dit",
    "flux",
    "guide",
    "latents",
    "leaves_no_trace",
    "narrowed_by_hand",
    "picture",
    "pixart",
    "qwen",
    "reproducible",
    "sd",
    "sd3",
    "sdxl",
    "seeded",
    "sharing",
    "small",
    "state_of",
    "svd",
    "text",
    "uncached",
    "unet",
    "vae",
    "wan",
    "wan_transformer",
]
