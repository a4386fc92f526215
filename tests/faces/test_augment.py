"""Image augmentation: shapes and ranges, seeds, and the effect of each transform."""

import pytest
import torch

from openpulid.faces.augment import (
    add_noise,
    blur,
    color_jitter,
    compress_jpeg,
    degrade,
    dilate,
    downscale,
    drop_patches,
    random_affine,
    sample_jitter,
    vary_face,
)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "transform",
    [
        color_jitter,
        blur,
        downscale,
        compress_jpeg,
        add_noise,
        degrade,
        drop_patches,
        vary_face,
    ],
)
def test_augmentation_keeps_shape_and_range_and_is_seeded(transform):
    images = torch.rand(8, 3, 64, 64, generator=seeded())
    augmented = transform(images, seeded())
    assert augmented.shape == images.shape and augmented.dtype == torch.float32
    assert augmented.min() >= -1e-6 and augmented.max() <= 1 + 1e-6
    assert not torch.equal(augmented, images)
    assert torch.equal(augmented, transform(images, seeded()))


@pytest.mark.parametrize("transform", [compress_jpeg, degrade, vary_face])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_gradients_pass_in_every_batch(transform, batch):
    images = 0.3 + 0.4 * torch.rand(batch, 3, 64, 64, generator=seeded())
    images.requires_grad_()
    transform(images, seeded()).sum().backward()
    assert (images.grad.abs().sum((1, 2, 3)) > 0).all()


def test_patches_are_gray_rectangles_of_limited_size():
    images = torch.zeros(64, 3, 40, 40)
    changed = drop_patches(images, seeded(), largest=0.3)
    assert set(changed.unique().tolist()) == {0.0, 0.5}
    for image in changed[:, 0]:
        rows, columns = (image.amax(axis) > 0 for axis in (1, 0))
        assert torch.equal(image > 0, rows[:, None] & columns)
        assert rows.sum() <= 13 and columns.sum() <= 13
    count = (changed.amax((1, 2, 3)) > 0).sum()
    assert 20 < count < 44


def test_crops_move_a_little():
    jitter = sample_jitter(50, 64, seeded())
    corner = (jitter * torch.tensor([0.0, 0.0, 1.0])).sum(-1)[:, :2]
    assert corner.abs().max() < 12 and corner.std(0).min() > 1


def test_jpeg_preserves_constant_blocks():
    images = (
        torch.rand(4, 3, 8, 8, generator=seeded()).repeat_interleave(8, -1).repeat_interleave(8, -2)
    )
    assert (compress_jpeg(images, seeded()) - images).abs().max() < 0.02


def test_gray_removes_color():
    images = torch.rand(16, 3, 8, 8, generator=seeded())
    gray = color_jitter(images, seeded(), gray=1.0)
    assert torch.allclose(gray[:, 0], gray[:, 2], atol=1e-5)


def test_dilation_changes_mask_edges_only():
    masks = torch.zeros(32, 1, 32, 32)
    masks[..., 8:24, 8:24] = 1
    changed = dilate(masks, seeded())
    assert (changed[..., 12:20, 12:20] == 1).all() and (changed[..., :5, :] == 0).all()
    sizes = changed.sum((1, 2, 3))
    assert sizes.min() < 256 < sizes.max()


def test_random_affine_keeps_center():
    matrix = random_affine(5, 64, seeded(), turn=0.3, grow=0.2, shift=0.0)
    middle = torch.tensor([32.0, 32.0, 1.0])
    assert torch.allclose((matrix * middle).sum(-1), middle.expand(5, 3), atol=1e-4)
    scale = torch.linalg.det(matrix).sqrt()
    assert (scale > 1 / 1.21).all() and (scale < 1.21).all()
