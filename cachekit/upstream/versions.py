"""The versions of torch and diffusers."""

from __future__ import annotations


def versions() -> dict[str, str]:
    """Collect the versions of torch and diffusers, which both are imported."""
    import diffusers
    import torch

    return {"torch": torch.__version__, "diffusers": diffusers.__version__}
