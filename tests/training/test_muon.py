"""Muon: its steps, and that common directions do not run away as with AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openpulid.training.muon import Muon, orthogonalize
from openpulid.training.optimizer import build_optimizer, set_lr
from openpulid.training.schedule import TrainerConfig


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (2, 16, 16)])
def test_orthogonalize_evens_singular_values_and_preserves_vectors(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.logspace(0, -1, u.shape[-1]).expand(shape[0], -1)
    made = orthogonalize(u @ torch.diag_embed(values) @ vh).float()
    assert made.shape == shape
    inside = u.mT @ made @ vh.mT  # diagonal, with all entries about 1
    made_values = inside.diagonal(dim1=-2, dim2=-1)
    assert made_values.min() > 0.6 and made_values.max() < 1.3
    assert (inside - torch.diag_embed(made_values)).abs().max() < 0.1


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_module_has_its_own_learning_rate(optimizer):
    parameters = {
        f"{module}.{name}": nn.Parameter(torch.ones(size))
        for module in ("new", "pretrained")
        for name, size in (("weight", (4, 4)), ("bias", (4,)))
    }
    config = TrainerConfig(
        steps=1, lr=0.1, optimizer=optimizer, weight_decay=0.0, lr_scales={"pretrained": 0.1}
    )
    for parameter in parameters.values():
        parameter.grad = torch.eye(4)[: parameter.ndim * 3 - 2].squeeze(0)
    updater = build_optimizer(parameters, config)
    set_lr(updater, 0.5 * config.lr)
    updater.step()
    for name in ("weight", "bias"):
        moved = 1 - parameters[f"new.{name}"].detach()
        assert moved.abs().max() > 0.01
        torch.testing.assert_close(1 - parameters[f"pretrained.{name}"].detach(), 0.1 * moved)


def test_one_step_matches_the_formulas():
    """A matrix or kernel moves by 0.2 lr sqrt(max(m, n)) times its orthogonalized gradient.

    A vector moves as with AdamW.
    """
    torch.manual_seed(0)
    matrix, kernel, vector = (
        nn.Parameter(torch.randn(shape)) for shape in ((6, 10), (4, 2, 3, 3), (5,))
    )
    before = [p.detach().clone() for p in (matrix, kernel, vector)]
    for p in (matrix, kernel, vector):
        p.grad = torch.randn_like(p)
    Muon([matrix, kernel, vector], lr=0.01, weight_decay=0.5).step()
    for p, was, rows in ((matrix, before[0], 6), (kernel, before[1], 4)):
        wanted = orthogonalize(p.grad.reshape(1, rows, -1))[0].float().view(p.shape)
        length = max(rows, p[0].numel()) ** 0.5
        step = (
            0.01 * 0.2 * length * wanted
        )  # of about 0.003; what follows the gradient is in bfloat16
        torch.testing.assert_close(p.detach(), was * (1 - 0.01 * 0.5) - step, atol=3e-4, rtol=0)
    torch.testing.assert_close(
        vector.detach(), before[2] - 0.01 * vector.grad.sign(), atol=1e-5, rtol=1e-4
    )


def test_memory_layout_does_not_change_the_step():
    torch.manual_seed(0)
    weight, gradient = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(weight.clone(memory_format=layout))
        p.grad = gradient.clone(memory_format=layout)
        Muon([p], lr=0.1).step()
        moved.append(p.detach().contiguous())
    torch.testing.assert_close(*moved)


def test_common_direction_does_not_run_away():
    """With a constant rank-one gradient AdamW's matrix grows far more than Muon's."""
    norms = {}
    for name, make in (
        ("adamw", lambda p: torch.optim.AdamW([p], lr=1e-3)),
        ("muon", lambda p: Muon([p], lr=1e-3)),
    ):
        weight = nn.Parameter(torch.zeros(128, 128))
        optimizer = make(weight)
        for _ in range(50):
            weight.grad = torch.ones(128, 128)
            optimizer.step()
        norms[name] = torch.linalg.matrix_norm(weight.detach(), 2).item()
    assert norms["adamw"] == pytest.approx(50 * 1e-3 * 128, rel=0.05)
    assert norms["muon"] < norms["adamw"] / 20
