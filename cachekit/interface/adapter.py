"""The interface of adapters: where a family of denoisers has its sites, and how guidance branches reach it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

from cachekit.interface.sites import Branches, SiteMap


@dataclass(frozen=True)
class Layout:
    """How the guidance branches of a run reach a denoiser.

    Either all branches share one call and lie in `order` along dimension 0 of the batch, or each has a call of its
    own, in that order (`separate`).

    `condition` is where the condition enters: "text", or "image" where the image latents are the second half of the
    sample's channels.

    `unbatched` and `layered` name arguments of the denoiser beyond those that diffusers' own denoisers have:
    `unbatched` ones have no batch dimension, even if their first size happens to equal the batch's, and `layered`
    ones have it as dimension 1, after one of layers.

    `calls` is the order of the branches' calls, for denoisers whose pipelines make one for each branch without naming
    it; empty otherwise. `negated` is set where pipelines negate the output before they pass it to the scheduler.

    >>> batched = Layout()
    >>> batched.order, batched.separate
    (('uncond', 'cond'), False)
    >>> batched.by_calls(("cond", "uncond")).separate
    True
    >>> batched.alone.order
    ('cond',)
    """

    order: Branches = ("uncond", "cond")
    condition: str = "text"
    unbatched: frozenset[str] = frozenset()
    layered: frozenset[str] = frozenset()
    calls: Branches = ()
    separate: bool = False
    negated: bool = False

    @property
    def together(self) -> int:
        """How many branches lie in the batch of one call."""
        return 1 if self.separate else len(self.order)

    @property
    def alone(self) -> Layout:
        """The layout for a run whose calls are never cut: one without guidance, or whose branches all stay."""
        return replace(self, order=("cond",), separate=False)

    def by_calls(self, order: Branches) -> Layout:
        """Make the layout of a run with a separate call for each branch, in this order."""
        return replace(self, order=order, separate=True)


class Adapter(Protocol):
    """A family of denoisers, recognised by structure.

    A plugin registers an instance in the hook `cachekit_register_adapters`. `name` and `summary`, one line, are for
    listings and errors. Exactly one installed adapter must match a denoiser.

    >>> class ToyAdapter:
    ...     name, summary = "toy", "transformers with a single list of blocks"
    ...     def matches(self, denoiser: Any) -> bool:
    ...         return type(denoiser).__name__ == "ToyTransformer"
    ...     def sites(self, denoiser: Any) -> SiteMap:
    ...         blocks = tuple(Site(f"blocks.{index}", Kind.BLOCK) for index in range(len(denoiser.blocks)))
    ...         return SiteMap("ToyTransformer", (*cachekit.module_sites(denoiser), *blocks), chains=(blocks,))
    ...     def layout(self, denoiser: Any) -> Layout:
    ...         return Layout(order=("cond", "uncond"))
    """

    name: str
    summary: str

    def matches(self, denoiser: Any) -> bool:
        """Whether `denoiser`, a `torch.nn.Module`, belongs to this family; called for any denoiser."""

    def sites(self, denoiser: Any) -> SiteMap:
        """Find the sites, regions and chains of `denoiser`, by the names that its `named_modules` gives.

        `cachekit.module_sites` finds the attention and feed-forward sites of any model of diffusers.
        """

    def layout(self, denoiser: Any) -> Layout:
        """Describe how pipelines pass guidance branches to `denoiser` in a guided run."""
