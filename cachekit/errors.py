"""Name every way in which cachekit refuses, so that a caller can catch one or all."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CachekitError(Exception):
    """Base of all errors of cachekit and its plugins; each is one line, whatever it quotes."""

    def __str__(self) -> str:
        """Return the message on one line: a file's or a user's text within it may hold line breaks."""
        return " ".join(super().__str__().splitlines())


class SpecError(CachekitError):
    """Report a spec that cannot be read: unknown policy, unknown key or bad value."""


class ConflictError(CachekitError):
    """Report policies that cannot work together."""


class SiteError(CachekitError):
    """Report a policy that finds nothing to act on in this model."""


class AdapterError(CachekitError):
    """Report a pipeline without a denoiser, or a denoiser that no adapter (or more than one) knows."""


class AttachmentError(CachekitError):
    """Report an attachment that is already there, or that something else has broken."""


class BudgetError(CachekitError):
    """Report a number of bytes into which nothing fits, or a place where nothing can be kept."""


class CostError(CachekitError):
    """Report costs that cannot be counted."""


class GuidanceError(CachekitError):
    """Report branches that reach the denoiser in a way that cannot be told apart safely."""


class PluginError(CachekitError):
    """Report a plugin that failed to load or registered something unusable."""


class PluginWarning(UserWarning):
    """Warn of a plugin that failed to load while the others go on."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the allowed word nearest to `word`, or nothing."""
    found = difflib.get_close_matches(word, sorted(allowed), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""
