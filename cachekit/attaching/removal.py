"""Undo `apply`."""

from __future__ import annotations

from typing import Any

from cachekit.attaching.lookup import INSTALLED, attachments_of
from cachekit.attaching.tracking import untrack
from cachekit.upstream.pipelines import with_inner


def remove(pipe: Any) -> None:
    """Undo `apply` on a pipeline or denoiser; without an attachment nothing happens.

    >>> import cachekit
    >>> pipe = cachekit.demo_pipeline()
    >>> attachment = cachekit.apply(pipe, "deepcache:interval=5")
    >>> remove(pipe)
    >>> attachment
    <Attachment: deepcache:interval=5 on UNet2DConditionModel, removed>
    """
    # A pipeline may have been given another denoiser since.
    left = [attachment for attachment in list(INSTALLED) if attachment.serves(pipe)]
    for attachment in [*attachments_of(pipe), *left]:
        attachment.remove()
    for tracked in with_inner(pipe):
        untrack(tracked)
