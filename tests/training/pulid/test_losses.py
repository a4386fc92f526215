"""ID loss and alignment against hand-computed values, and where their gradients stop."""

from __future__ import annotations

import math

import pytest
import torch

from openpulid.errors import OptionError
from openpulid.training.pulid.losses import (
    IDLoss,
    LayoutAlignment,
    OutsideLoss,
    SemanticAlignment,
)
from openpulid.training.pulid.models import AttentionQK


def test_id_loss_matches_the_formula():
    wanted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    shown = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, -1.0]]).bfloat16()
    loss = IDLoss()
    assert loss(wanted, shown, torch.tensor([True, True, True])).item() == pytest.approx(
        (0 + 1 + 2) / 3
    )
    assert loss(wanted, shown, torch.tensor([True, True, False])).item() == pytest.approx(
        1 / 3
    )  # left out
    assert loss(wanted, shown, torch.tensor([False] * 3)).item() == 0.0
    assert loss(wanted, shown, torch.tensor([True] * 3)).dtype == torch.float32


def attended(query: list[list[float]], key: list[list[float]]) -> AttentionQK:
    return AttentionQK(torch.tensor(query)[None, None], torch.tensor(key)[None, None])


def test_layout_alignment_matches_the_formula():
    key = [[1.0]]
    a, b = attended([[1.0], [2.0]], key), attended([[4.0], [6.0]], key)
    assert LayoutAlignment()([a], [b]).item() == pytest.approx(math.sqrt((9 + 16) / 2))
    same = LayoutAlignment()([a, a], [a, b]).item()  # two layers, one of them undisturbed
    assert same == pytest.approx(math.sqrt((9 + 16) / 2) / 2, abs=1e-5)


def test_semantic_alignment_matches_the_formula():
    # one token with key 1, two positions: softmax(k q) over positions weighs the queries
    a, b = attended([[0.0], [math.log(3)]], [[1.0]]), attended([[0.0], [0.0]], [[1.0]])
    assert SemanticAlignment()([a], [b]).item() == pytest.approx(
        0.75 * math.log(3)
    )  # weights 1/4 and 3/4
    # of width 4 the products are divided by 2
    wide = attended([[0.0] * 4, [math.log(3) / 2] * 4], [[1.0] * 4])
    still = attended([[0.0] * 4, [0.0] * 4], [[1.0] * 4])
    assert SemanticAlignment()([wide], [still]).item() == pytest.approx(0.75 * math.log(3) / 2)


def test_outside_loss_is_the_mean_difference_outside_the_faces():
    target = torch.zeros(2, 3, 2, 2, requires_grad=True)
    images = torch.zeros(2, 3, 2, 2)
    images[0, :, 0, 0] = -0.5
    images[0, 1, 1, 1] = 0.6
    images[1] = 1.0
    images.requires_grad_()
    faces = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]]])
    # of the first image three pixels are outside, of the second none
    loss = OutsideLoss()(images, target, faces)
    assert loss.item() == pytest.approx(0.5 * (0.6 / 3) / 3)
    loss.backward()
    assert images.grad.nonzero().tolist() == [[0, 1, 1, 1]] and target.grad is None


@pytest.mark.parametrize("loss", [SemanticAlignment(), LayoutAlignment()])
def test_target_carries_no_gradient(loss):
    own, target = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(2))
    key = torch.randn(1, 2, 5, 4)
    loss([AttentionQK(own, key)], [AttentionQK(target, key)]).backward()
    assert own.grad.abs().sum() > 0 and target.grad is None
    nothing = torch.randn(1, 1, 2, 2, requires_grad=True)
    loss(
        [AttentionQK(nothing, key[:, :1, :, :2])], [AttentionQK(nothing, key[:, :1, :, :2])]
    ).backward()
    assert torch.isfinite(nothing.grad).all()  # a root at zero


def test_different_layers_raise():
    one = attended([[1.0]], [[1.0]])
    with pytest.raises(OptionError, match="1 layers"):
        LayoutAlignment()([one], [])
