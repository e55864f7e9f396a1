"""Pipelines that all tests of a file share."""

from __future__ import annotations

import functools

from cachekit.testing.tiny.calls import latents


def sharing(makers):
    """Make a function that builds each pipeline once: whatever is applied to it is undone, so all runs can share it."""
    return functools.cache(lambda name: makers[name]())


def uncached(shared, **given):
    """Make a function that runs each shared pipeline once without policies; changes go over `given`."""
    return functools.cache(lambda name, **changes: latents(shared(name), **{**given, **changes}))
