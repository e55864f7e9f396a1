"""Keep the keys and values of the text for a whole run: the text is the same in every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from cachekit import After, Choice, Kind, Policy, Reuse, Sites


class TextKeyValue(Policy):
    """Text keys and values: their projections run in the first step of each guidance branch, and are kept for the run.

    Exact where the text that reaches cross-attention is the same in all steps.
    """

    name: ClassVar[str] = "text_kv"
    summary: ClassVar[str] = "project the text to keys and values once in a run: the same images with less work"

    def choices(self) -> Mapping[str, Choice]:
        """Choose the projections of the text."""
        return {"projections": Choice(Sites(kinds=(Kind.TEXT_KEY_VALUE,)), After(m=1), Reuse())}
