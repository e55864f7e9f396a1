"""Find the attachments of a denoiser or a pipeline."""

from __future__ import annotations

import weakref
from typing import Any

from cachekit.attaching.attachment import Attachment
from cachekit.upstream.pipelines import denoisers_of

ATTRIBUTE = "_cachekit_attachment"


INSTALLED: weakref.WeakSet[Attachment] = weakref.WeakSet()


def attachment_of(denoiser: Any) -> Attachment | None:
    """Return the attachment of a denoiser, if it has one."""
    found: Attachment | None = vars(denoiser).get(ATTRIBUTE)
    return found


def attachments_of(pipe: Any) -> list[Attachment]:
    """Return the attachments of a pipeline's denoisers, each once."""
    found = {id(it): it for it in map(attachment_of, denoisers_of(pipe).values()) if it is not None}
    return list(found.values())
