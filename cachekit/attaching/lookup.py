"""Find the attachments of a denoiser or a pipeline."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Protocol

from cachekit.interface.policy import Policy
from cachekit.upstream.pipelines import denoisers_of

#: The attribute of an attached denoiser that holds its attachment.
ATTRIBUTE = "_cachekit_attachment"


class Attached(Protocol):
    """An attachment, as its pipelines see it."""

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies attached."""

    def run_of(
        self, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Bound the runs of one call of `pipe`."""

    def serves(self, pipe: Any) -> bool:
        """Whether `pipe` has been attached, or has run with an attached denoiser."""

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Run this thread's calls uncached within the block."""

    def remove(self) -> None:
        """Put everything back."""


#: The attachments that are installed.
INSTALLED: weakref.WeakSet[Attached] = weakref.WeakSet()


def attachment_of(denoiser: Any) -> Attached | None:
    """Find the attachment of a denoiser, if it has one."""
    found: Attached | None = vars(denoiser).get(ATTRIBUTE)
    return found


def attachments_of(pipe: Any) -> list[Attached]:
    """List the attachments of a pipeline's denoisers, each once."""
    found = {id(it): it for it in map(attachment_of, denoisers_of(pipe).values()) if it is not None}
    return list(found.values())
