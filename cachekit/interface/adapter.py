"""Define what an adapter says of a family of denoisers; it never knows a policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from cachekit.interface.sites import Branches, SiteMap


@dataclass(frozen=True)
class Layout:
    """Say how the branches of a guided call reach a denoiser.

    `order` is their order along dimension 0, or that of their calls where each has a call of its own
    (`separate`). `calls` is that order for denoisers whose pipelines make such calls and do not name them.
    `condition` tells where the condition enters ("text", or "image" where the image latents are part of the
    sample); `unbatched` are parameters of the denoiser that never have a batch dimension, whatever their first
    size is, `layered` those whose batch is dimension 1, after one of layers. `negated` says that pipelines turn the
    sign of what the denoiser returns before the scheduler sees it.
    """

    order: Branches = ("uncond", "cond")
    condition: str = "text"
    unbatched: frozenset[str] = frozenset({"image_rotary_emb", "img_ids", "txt_ids", "ip_adapter_masks"})
    layered: frozenset[str] = frozenset({"encoder_hidden_states_llama3"})
    calls: Branches = ()
    separate: bool = False
    negated: bool = False

    @property
    def alone(self) -> Layout:
        """Return the layout of a run without guidance, or with one that nobody narrows."""
        return replace(self, order=("cond",), separate=False)

    def by_calls(self, order: Branches) -> Layout:
        """Return the layout of a run that calls each branch on its own, in this order."""
        return replace(self, order=order, separate=True)


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
