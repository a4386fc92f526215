"""Figures of held-out losses."""

from __future__ import annotations

import pytest
import torch

from openpulid.training.pulid.held_out import summarize_held_out


def test_gains_and_their_standard_errors() -> None:
    losses = {
        "own": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "other": torch.tensor([1.0, 2.0, 3.0, 6.0]),
        "none": torch.tensor([2.0, 3.0, 4.0, 5.0]),
    }
    metrics = summarize_held_out(losses)
    assert metrics == pytest.approx(
        {
            "held_out_own": 2.5,
            "held_out_other": 3.0,
            "held_out_none": 3.5,
            "held_out_over_none": 1.0,
            "held_out_over_none_se": 0.0,
            "held_out_over_other": 0.5,
            "held_out_over_other_se": 0.5,  # gains 0, 0, 0, 2: standard deviation 1, four images
        }
    )
