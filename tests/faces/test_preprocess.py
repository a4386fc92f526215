"""The gray face on white that the vision encoder sees."""

import torch

from openpulid.faces.align import gray_on_white


def test_masked_pixels_are_gray_and_others_white():
    crop = torch.zeros(1, 3, 2, 2)
    crop[0, :, 0, 0] = torch.tensor([1.0, 0.5, 0.25])
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 0.5]]]])
    result = gray_on_white(crop, mask)
    assert result.shape == (1, 3, 2, 2)
    assert torch.allclose(
        result[0, :, 0, 0], torch.tensor(0.299 + 0.587 * 0.5 + 0.114 * 0.25).expand(3)
    )
    assert torch.allclose(result[0, :, 0, 1], torch.ones(3))
    assert torch.allclose(result[0, :, 1, 0], torch.zeros(3))
    assert torch.allclose(result[0, :, 1, 1], torch.full((3,), 0.5))


def test_gray_on_white_is_differentiable():
    crop = torch.rand(1, 3, 4, 4).requires_grad_()
    gray_on_white(crop, torch.ones(1, 1, 4, 4)).sum().backward()
    assert torch.allclose(crop.grad[0, :, 0, 0], 3 * torch.tensor([0.299, 0.587, 0.114]))
