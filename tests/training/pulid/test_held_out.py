"""Figures of held-out losses."""

from __future__ import annotations

import math

import pytest
import torch

from openpulid.training.pulid.held_out import HeldOutLosses, summarize_held_out


def test_gains_and_their_standard_errors() -> None:
    losses = {
        "own": torch.tensor([1.0, 2.0, 3.0, 4.0]),
        "other": torch.tensor([1.0, 2.0, 3.0, 6.0]),
        "none": torch.tensor([2.0, 3.0, 4.0, 5.0]),
    }
    metrics = summarize_held_out(HeldOutLosses(losses, torch.arange(4)))
    assert metrics == pytest.approx(
        {
            "held_out_own": 2.5,
            "held_out_other": 3.0,
            "held_out_none": 3.5,
            "held_out_over_none": 1.0,
            "held_out_over_none_se": 0.0,
            "held_out_over_other": 0.5,
            "held_out_over_other_se": 0.5,  # gains 0, 0, 0, 2: standard deviation 1, four people
        }
    )


def test_images_of_one_person_count_once() -> None:
    """More images of the same people make no gain more certain."""
    own = torch.zeros(8)
    gain = torch.tensor([0.0, 2.0, 0.0, 2.0, 3.0, 5.0, 3.0, 5.0])
    people = torch.tensor([7, 7, 7, 7, 2, 2, 2, 2])
    losses = HeldOutLosses({"own": own, "other": gain, "none": own}, people)
    metrics = summarize_held_out(losses)
    assert metrics["held_out_over_other"] == 2.5
    assert metrics["held_out_over_other_se"] == pytest.approx(1.5)  # of the means 1 and 4


def test_batch_without_another_person_has_no_gain_over_others() -> None:
    nan = float("nan")
    losses = {
        "own": torch.tensor([1.0, 1.0, 2.0]),
        "other": torch.tensor([nan, nan, 3.0]),
        "none": torch.tensor([2.0, 2.0, 2.0]),
    }
    metrics = summarize_held_out(HeldOutLosses(losses, torch.tensor([0, 0, 1])))
    assert metrics["held_out_other"] == 3.0 and metrics["held_out_over_other"] == 1.0
    assert math.isnan(metrics["held_out_over_other_se"])
    assert metrics["held_out_over_none"] == pytest.approx(2 / 3)
