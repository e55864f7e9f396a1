"""Be the process in which one pipeline is examined; loading this loads the libraries."""

from __future__ import annotations

import logging
import os
from typing import Any

# Nothing is downloaded, and what is missing must not be looked for.
os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
import transformers

from cachekit.coverage.trial import examine


def work(answer: Any, name: str, specs: list[str]) -> None:
    """Examine the pipeline class `name` and send the trial through `answer`, a connection."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("cachekit").setLevel(logging.ERROR)  # what it warns of is asked for here
    answer.send(examine(name, specs))
    answer.close()
