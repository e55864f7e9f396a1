"""The process that examines one pipeline. Importing this module loads the libraries."""

from __future__ import annotations

import logging
import os
from typing import Any

# Set before the imports below, which read it: nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
import transformers

from cachekit.tools.coverage.trial import examine


def work(answer: Any, name: str, specs: list[str]) -> None:
    """Examine the pipeline class `name`, and send its trial through the connection `answer`."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("cachekit").setLevel(logging.ERROR)  # policies that never fire are results here, not mistakes
    answer.send(examine(name, specs))
    answer.close()
