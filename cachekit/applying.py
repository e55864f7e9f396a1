"""Apply caching policies to a pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cachekit.attaching.attachment import Attachment
from cachekit.attaching.lookup import attachment_of
from cachekit.costs.budget import Fitting
from cachekit.costs.replay import cost_of
from cachekit.driving.setup import Setup
from cachekit.errors import AttachmentError
from cachekit.interface.specs import Spec, parse_all
from cachekit.registry.catalog import Catalog, installed
from cachekit.runs.limit import Limit
from cachekit.upstream.hooks import refuse_other_caches
from cachekit.upstream.pipelines import denoisers_of


def apply(
    pipe: Any,
    specs: Spec | Iterable[Spec],
    *,
    max_cache_bytes: int | None = None,
    cache_device: Any = None,
    catalog: Catalog | None = None,
) -> Attachment:
    """Apply caching policies to a pipeline (or a bare denoiser) and return the attachment that undoes it.

    `specs` is one or several of `"name:key=value"` or policy instances. No run keeps more than `max_cache_bytes`
    at once: before it begins, what saves least for its bytes is given up, and a run that nothing fits into is
    refused. `cache_device`, such as "cpu", is where kept tensors lie between their uses. Raise a `CachekitError`
    with one line that says what to do, and leave the pipeline as it was, when that is impossible.
    """
    limit = Limit.of(max_cache_bytes, cache_device)
    catalog = catalog or installed()
    policies = parse_all(specs, catalog.policies)
    denoisers = denoisers_of(pipe)
    for denoiser in denoisers.values():
        found = attachment_of(denoiser)
        if found is not None:
            present = ", ".join(repr(str(policy)) for policy in found.policies)
            raise AttachmentError(
                f"{type(denoiser).__name__} already has an attachment ({present});"
                " call cachekit.remove(pipe) first, or give all specs to one apply"
            )
    for name, denoiser in denoisers.items():
        refuse_other_caches(denoiser, name)
    attachment = Attachment(Setup.of(denoisers, policies, catalog), limit, cost_of, Fitting(limit))
    attachment.install(pipe)
    return attachment
