"""Settings of all tests: offline, one thread, quiet libraries."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import diffusers
import torch

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
