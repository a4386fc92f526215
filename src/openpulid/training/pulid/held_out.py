"""The losses of held-out people as figures: their means, and what the own identity gains."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

HELD_OUT_BATCHES = 4
HELD_OUT_SEED = 0
"""Recipes of any seed are validated with the same images and noise."""


def summarize_held_out(losses: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute the means of losses per image, and the gains of the own identity.

    Args:
        losses: see `PuLIDTask.held_out_losses`.

    Returns:
        See `PuLIDTask.validate`. The standard error is NaN for a single image.
    """
    metrics = {f"held_out_{name}": values.mean().item() for name, values in losses.items()}
    for name in ("none", "other"):
        gain = losses[name] - losses["own"]
        metrics[f"held_out_over_{name}"] = gain.mean().item()
        metrics[f"held_out_over_{name}_se"] = (gain.std() / len(gain) ** 0.5).item()
    return metrics
