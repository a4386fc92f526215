"""Muon: what its steps look like, and that it keeps attention from collapsing where AdamW does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openpulid.training.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (2, 16, 16)])
def test_orthogonal_evens_out_singular_values_and_keeps_their_vectors(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.logspace(0, -1, u.shape[-1]).expand(shape[0], -1)
    made = orthogonalize(u @ torch.diag_embed(values) @ vh).float()
    assert made.shape == shape
    inside = u.mT @ made @ vh.mT  # diagonal, with all entries about 1
    made_values = inside.diagonal(dim1=-2, dim2=-1)
    assert made_values.min() > 0.6 and made_values.max() < 1.3
    assert (inside - torch.diag_embed(made_values)).abs().max() < 0.1


def test_one_step_by_hand():
    """A matrix moves by 0.2 lr sqrt(max(m, n)) times its orthogonal gradient, a vector as AdamW does; kernels are matrices."""
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


def test_layout_in_memory_changes_nothing():
    torch.manual_seed(0)
    weight, gradient = torch.randn(4, 3, 3, 3), torch.randn(4, 3, 3, 3)
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(weight.clone(memory_format=layout))
        p.grad = gradient.clone(memory_format=layout)
        Muon([p], lr=0.1).step()
        moved.append(p.detach().contiguous())
    torch.testing.assert_close(*moved)


def test_a_direction_that_all_agree_on_does_not_run_away():
    """The same rank-one gradient for queries again and again: AdamW's matrix outgrows Muon's by far more than its rate says."""
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
