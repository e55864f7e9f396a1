"""Reaching the hub, or finding out quickly that it can't be reached."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

from cachekit.errors import first_line
from cachekit.models.names import Sort, named, unreadable

__all__ = ["hub_arguments"]

#: Seconds to wait for any answer of the hub.
_WAIT = 3.0
#: Files of which a downloaded pipeline or a bare model has one.
_INDICES = ("model_index.json", "config.json")


def hub_arguments(model: str, cache_dir: Any = None) -> dict[str, Any]:
    """Make the arguments with which a model is loaded: from downloaded files alone, where the hub can't be reached.

    The hub's client would try again for a minute, and then name the file that it lacks. Raises `ModelError` within
    seconds where the hub can't be reached, and the model was not downloaded.
    """
    if named(model).sort is not Sort.HUB:
        return {}
    reason = _unreachable()
    if not reason:
        return {}
    if not _is_downloaded(model, cache_dir):
        raise unreadable(model, f"{reason}, and it is not among the models downloaded before")
    return {"local_files_only": True}


def _is_downloaded(model: str, cache_dir: Any) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(model, name, cache_dir=cache_dir), str) for name in _INDICES)


def _unreachable() -> str:
    """Describe why the hub can't be reached; "" where it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked, as HF_HUB_OFFLINE is set"
    return _no_answer(constants.ENDPOINT)


@lru_cache(maxsize=4)
def _no_answer(endpoint: str) -> str:
    """Describe why an address gives no answer; "" where it gives any."""
    from huggingface_hub import get_session

    reasons: list[str] = []

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=_WAIT)
            reasons.append("")
        except Exception as error:  # noqa: BLE001 - the client differs between versions of the hub's library
            reasons.append(f"no network, or none to {endpoint}: {first_line(error)}")

    # The lookup of a name has no time limit of its own.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_WAIT)
    return reasons[0] if reasons else f"no network, or none to {endpoint}: no answer within {_WAIT:g} seconds"
