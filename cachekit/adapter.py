"""Define what an adapter says of a family of denoisers; it never knows a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from .plan import Branches
from .sites import SiteMap


@dataclass(frozen=True)
class Layout:
    """Say how the branches of a guided call lie in the batch.

    `order` is their order along dimension 0; `condition` tells where the condition enters ("text", or
    "image" where the image latents are part of the sample); `unbatched` are parameters of the denoiser that
    never have a batch dimension, whatever their first size is.
    """

    order: Branches = ("uncond", "cond")
    condition: str = "text"
    unbatched: frozenset[str] = frozenset({"image_rotary_emb", "img_ids", "txt_ids", "ip_adapter_masks"})


class Adapter(Protocol):
    """Know one family of denoisers by structure."""

    name: str
    summary: str

    def matches(self, denoiser: Any) -> bool:
        """Tell whether this adapter knows `denoiser` (a `torch.nn.Module`)."""

    def sites(self, denoiser: Any) -> SiteMap:
        """Return the sites, regions and chains of `denoiser`."""

    def layout(self, denoiser: Any) -> Layout:
        """Return how guidance branches reach `denoiser`."""
