"""Alignment of faces by five landmarks."""

import math

import pytest
import torch

from openpulid.faces.align import (
    GRAY,
    TEMPLATE,
    align_faces,
    compose_affine,
    gray_on_white,
    similarity_transform,
    warp_images,
)


def transform(
    points: torch.Tensor, angle: float, scale: float, shift: tuple[float, float]
) -> torch.Tensor:
    rotation = scale * torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    )
    return points @ rotation.T + torch.tensor(shift)


def test_similarity_recovers_known_transform():
    template = TEMPLATE * 64
    landmarks = transform(template, 0.3, 1.7, (5.0, -2.0))[None]
    matrix = similarity_transform(landmarks, template)
    cos, sin = 1.7 * math.cos(0.3), 1.7 * math.sin(0.3)
    expected = torch.tensor([[cos, -sin, 5.0], [sin, cos, -2.0]])
    assert torch.allclose(matrix[0], expected, atol=1e-4)


def test_similarity_is_least_squares_optimum():
    generator = torch.Generator().manual_seed(0)
    template = TEMPLATE * 64
    landmarks = template + 3 * torch.randn(1, 5, 2, generator=generator)

    def residual(matrix):
        return (template @ matrix[:, :2].T + matrix[:, 2] - landmarks[0]).square().sum()

    best = similarity_transform(landmarks, template)[0]
    for _ in range(20):
        c, s, x, y = 0.05 * torch.randn(4, generator=generator)
        perturbed = best + torch.stack([torch.stack([c, -s, x]), torch.stack([s, c, y])])
        assert residual(best) <= residual(perturbed)


def test_compose_affine_is_matrix_product():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.rand(3, 2, 3, generator=generator)
    first = torch.rand(3, 3, 3, generator=generator)
    assert torch.allclose(compose_affine(matrix, first), matrix @ first, atol=1e-6)


def test_identity_warp_returns_image():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    matrix = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).expand(2, 2, 3)
    assert torch.allclose(warp_images(images, matrix, 16), images, atol=1e-5)


def test_pixel_centers_are_at_one_half():
    images = torch.arange(8.0).expand(1, 1, 8, 8)
    # Half size: pixel k is between 2k and 2k + 1.
    matrix = torch.tensor([[[2.0, 0, 0], [0, 2, 0]]])
    assert torch.allclose(
        warp_images(images, matrix, 4)[0, 0, 1], torch.tensor([0.5, 2.5, 4.5, 6.5])
    )


def test_background_is_gray_and_face_has_gradient():
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    landmarks = (TEMPLATE * 64 + 16)[None]
    masks = torch.zeros(1, 1, 96, 96)
    masks[..., 40:60, 40:60] = 1
    crops = align_faces(images, masks, landmarks, 64)
    assert crops.shape == (1, 3, 64, 64)
    assert torch.allclose(crops[..., 24:44, 24:44], images[..., 40:60, 40:60], atol=1e-4)
    assert torch.allclose(crops[..., :20, :], torch.tensor(GRAY))
    crops.sum().backward()
    inside = images.grad[..., 41:59, 41:59].sum()
    assert inside > 0 and images.grad.sum() == pytest.approx(inside.item() * 400 / 324, rel=0.05)


def test_autocast_does_not_round_coordinates():
    landmarks = transform(TEMPLATE * 64, 0.1, 1.3, (7.3, 4.1))[None]
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    plain = align_faces(images, torch.ones(1, 1, 96, 96), landmarks, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = align_faces(images, torch.ones(1, 1, 96, 96), landmarks, 64)
    assert torch.equal(plain, mixed)


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
