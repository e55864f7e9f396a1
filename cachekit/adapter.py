"""Define what an adapter says of a family of denoisers; it never knows a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from .sites import SiteMap

if TYPE_CHECKING:
    from .guidance import Layout


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
