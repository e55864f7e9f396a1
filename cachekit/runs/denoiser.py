"""An attached denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from cachekit.upstream.arguments import parameters_of

if TYPE_CHECKING:
    from cachekit.interface.adapter import Adapter, Layout
    from cachekit.interface.sites import SiteMap


@dataclass(frozen=True)
class Denoiser:
    """An attached denoiser, the sites and the layout that its adapter found, and its forward's parameters in order."""

    name: str
    module: nn.Module
    sites: SiteMap
    layout: Layout
    parameters: tuple[str, ...]

    @classmethod
    def of(cls, name: str, module: nn.Module, adapter: Adapter) -> Denoiser:
        """Describe `module` by what `adapter` finds."""
        return cls(name, module, adapter.sites(module), adapter.layout(module), parameters_of(module))
