"""Apply caching policies to a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from cachekit.attaching.attachment import Attachment
from cachekit.attaching.lookup import attachment_of
from cachekit.costs.fitting import Fitter
from cachekit.costs.replay import cost_of
from cachekit.driving.driver import CostFunction
from cachekit.driving.evidence import warn_of_pipeline
from cachekit.driving.setup import Setup
from cachekit.errors import AttachmentError, IdleWarning
from cachekit.interface.sites import SiteMap
from cachekit.interface.specs import Spec, read_all
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
    """Apply caching policies to a pipeline, until the returned attachment is removed.

        with cachekit.apply(pipe, ["tgate:m=10", "deepcache:interval=2"]) as attachment:
            image = pipe("a large red circle top left on white").images[0]
            print(attachment.report())

    `pipe` is a diffusers pipeline or a bare denoiser. `specs` is one policy or several: each a spec such as
    "tgate:m=10,sp_interval=2" (a name, then options) or a `Policy` instance. `cachekit.policies()` lists the names.
    "preset:FILE" or "preset:NAME" stands for the specs of a preset; where the pipeline, or a run of it, differs from
    what its evidence is for, a `PresetWarning` names both values. Without any spec, an `IdleWarning` states that
    nothing will be cached.
    `remove(pipe)`, `attachment.remove()` and the end of a `with` block all restore the pipeline exactly.
    `attachment.using(specs)` has some runs follow other specs.

    `max_cache_bytes` limits what a run keeps at once: before the run begins, the places that save the fewest MACs per
    byte are left uncached. `cache_device`, such as "cpu", holds kept tensors between their uses; by default
    they stay where they were computed. `catalog` replaces the installed policies and adapters.

    Raises a `CachekitError` of one line that names what to do, and leaves the pipeline as it was: for an unknown
    policy or option (`SpecError`), policies that collide (`ConflictError`), a denoiser without an adapter
    (`AdapterError`) or without the sites that a policy acts on (`SiteError`), a preset that can't be used
    (`PresetError`), and a pipeline with an attachment or another cache (`AttachmentError`). What only a run can show is
    raised when it begins: guidance that isn't supported (`GuidanceError`), and a `max_cache_bytes` that nothing fits
    into (`BudgetError`).
    """
    attachment = attach(pipe, specs, max_cache_bytes=max_cache_bytes, cache_device=cache_device, catalog=catalog)
    if not attachment.policies:
        warnings.warn(
            f"no policy applied to {type(pipe).__name__}: runs are cached within attachment.using(specs) alone",
            IdleWarning,
            stacklevel=2,
        )
    return attachment


def attach(
    pipe: Any,
    specs: Spec | Iterable[Spec],
    *,
    max_cache_bytes: int | None = None,
    cache_device: Any = None,
    catalog: Catalog | None = None,
    cost: CostFunction = cost_of,
) -> Attachment:
    """Apply policies like `apply`; without any the attachment only counts, and no warning is due.

    `cost` counts the MACs of runs.
    """
    limit = Limit.of(max_cache_bytes, cache_device)
    catalog = catalog or installed()
    policies, presets = read_all(specs, catalog)
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
        refuse_other_caches(denoiser, name, denoiser.modules())
    setup = Setup.of(denoisers, policies, catalog, presets)
    attachment = Attachment(setup, limit, cost, Fitter)
    attachment.install(pipe)
    for preset in presets:
        warn_of_pipeline(preset, pipe, next(iter(denoisers.values())))
    return attachment


def attachment(pipe: Any) -> Attachment | None:
    """Find the attachment of a pipeline or denoiser that `apply` has made; None where there is none.

    >>> import cachekit
    >>> pipe = cachekit.demo_pipeline()
    >>> with cachekit.apply(pipe, "deepcache:interval=5"):
    ...     cachekit.attachment(pipe)
    <Attachment: deepcache:interval=5 on UNet2DConditionModel>

    Raises `AdapterError` for an object without a denoiser.
    """
    found = (attachment_of(denoiser) for denoiser in denoisers_of(pipe).values())
    return next((one for one in found if isinstance(one, Attachment)), None)


def sites(pipe: Any, *, catalog: Catalog | None = None) -> dict[str, SiteMap]:
    """Find where policies can act in each denoiser of a pipeline, by its name in the pipeline.

        for name, found in cachekit.sites(pipe).items():
            print(name, found.describe())

    Raises `AdapterError` where no adapter matches, or more than one.
    """
    known = catalog or installed()
    return {name: known.adapter_for(module).sites(module) for name, module in denoisers_of(pipe).items()}
