"""What is kept of an output: quantities that need what entered, and shapes that allow none."""

from __future__ import annotations

import pytest
import torch

from cachekit import SiteError, Time
from cachekit.runs.quantities import give_whole, take_whole


def test_a_residual_of_the_denoiser_leaves_channels_that_only_the_output_has():
    sample, output = torch.full((1, 2, 3), 5.0), torch.full((1, 4, 3), 7.0)
    (kept,) = take_whole("residual", (output,), sample, Time(0))
    assert kept[:, :2].unique().tolist() == [2.0]
    assert kept[:, 2:].unique().tolist() == [7.0]
    assert give_whole("residual", (kept,), sample, Time(0))[0].equal(output)


def test_there_is_no_residual_between_other_numbers_of_dimensions():
    tokens, scores = torch.zeros(1, 64), torch.zeros(1, 11, 64)
    with pytest.raises(SiteError, match=r"^\(1, 64\) entered, but \(1, 11, 64\) left: .*; use of=output"):
        take_whole("residual", (scores,), tokens, Time(0))
