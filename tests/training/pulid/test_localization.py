"""FastComposer's losses against the figures of its code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from openpulid.errors import OptionError
from openpulid.training.pulid.branches import DiffusionStep
from openpulid.training.pulid.localization import (
    LocalizationLoss,
    MaskedDiffusionLoss,
    resize_masks,
)
from openpulid.training.pulid.models import AttentionQK
from tests.conftest import Golden

TOLERANCE = 2e-5
POSITIONS = torch.tensor([[3, 6], [2, 0]])
IS_SHOWN = torch.tensor([[True, True], [True, False]])


@pytest.fixture(scope="module")
def masks() -> Tensor:
    masks = torch.zeros(2, 2, 32, 32)
    masks[0, 0, 4:20, 2:14] = 1
    masks[0, 1, 8:28, 18:30] = 1
    masks[1, 0, :, 10:25] = 1
    return masks


def weights(golden: Golden, side: int) -> Tensor:
    """Attention weights of a layer, two images with four heads."""
    scores = golden.input(f"fc.scores.{side}", 8, side**2, 10)
    return (2 * scores).softmax(-1).unflatten(0, (2, 4))


def test_localization_of_layers(golden: Golden, masks: Tensor) -> None:
    loss = LocalizationLoss()
    layers = [loss.per_layer(weights(golden, side), masks, POSITIONS, IS_SHOWN) for side in (8, 4)]
    for side, value in zip((8, 4), layers, strict=True):
        assert golden.error(f"fastcomposer.localisation.{side}", value) < TOLERANCE
    mean = torch.stack(layers).mean()
    assert golden.error("fastcomposer.localisation.mean", mean) < TOLERANCE


def test_localization_of_captured_attention(golden: Golden, masks: Tensor) -> None:
    """Queries and keys whose product gives the figures' scores, at any scale of the head."""
    layers = []
    for side in (8, 4):
        scores = 2 * golden.input(f"fc.scores.{side}", 8, side**2, 10).unflatten(0, (2, 4))
        keys = 10**0.5 * torch.eye(10).expand(2, 4, 10, 10)
        layers.append(AttentionQK(scores.requires_grad_(), keys))
    loss = LocalizationLoss()(layers, masks, POSITIONS, IS_SHOWN)
    assert golden.error("fastcomposer.localisation.mean", loss.detach()) < TOLERANCE
    loss.backward()
    for layer in layers:
        gradient = layer.query.grad
        assert gradient is not None and gradient.abs().sum() > 0
    with pytest.raises(OptionError, match="at least one layer"):
        LocalizationLoss()([], masks, POSITIONS, IS_SHOWN)


def test_masks_of_a_layer(golden: Golden, masks: Tensor) -> None:
    resized = resize_masks(masks, 64).unflatten(-1, (8, 8))
    assert golden.error("fastcomposer.segmaps.8", resized) < TOLERANCE
    left = torch.zeros(1, 1, 16, 32)
    left[..., :16] = 1
    grid = resize_masks(left, 32)[0, 0].unflatten(-1, (4, 8))  # of the same ratio
    assert torch.equal(grid > 0.5, torch.arange(8).expand(4, 8) < 4)


def test_loss_of_the_masked_region(golden: Golden, masks: Tensor) -> None:
    prediction = golden.input("fc.pred", 2, 4, 8, 8)
    target = golden.input("fc.target", 2, 4, 8, 8)
    step = DiffusionStep(prediction, target, x_t=target, t=torch.zeros(2))
    loss = MaskedDiffusionLoss()(step, masks)
    assert golden.error("fastcomposer.masked_loss", loss) < TOLERANCE
