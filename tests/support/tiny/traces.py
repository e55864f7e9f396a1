"""Whether a pipeline and its denoiser are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cachekit.upstream.pipelines import denoiser_of


def _content(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else ()
    return id(value), [(key, id(item)) for key, item in items]


def state_of(pipe: Any) -> Any:
    """Identities of everything that a pipeline and the modules of its denoiser hold."""
    modules = [pipe, *denoiser_of(pipe).modules()]
    return [(type(module), {key: _content(value) for key, value in vars(module).items()}) for module in modules]


@contextmanager
def leaves_no_trace(pipe: Any) -> Iterator[None]:
    """Check that what happens inside leaves pipeline and denoiser exactly as they were."""
    before = state_of(pipe)
    yield
    assert state_of(pipe) == before
