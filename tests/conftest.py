"""Settings of all tests: offline, one thread, quiet libraries, the same examples in every run, and `benchmarks`."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import diffusers
import hypothesis
import torch
from support.sources import load_benchmarks

torch.set_num_threads(1)
load_benchmarks()
diffusers.utils.logging.set_verbosity_error()

hypothesis.settings.register_profile("repeatable", derandomize=True, database=None)
# To look for new examples: pytest --hypothesis-profile=default
hypothesis.settings.load_profile("repeatable")
