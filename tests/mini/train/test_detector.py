import numpy as np
import pytest
import torch

from openpulid.faces.miniature import FACE, MiniDetection, MiniFaceDetector
from openpulid.mini.data import negatives
from openpulid.mini.train.detector import (
    DetectorBatch,
    DetectorTask,
    apply_random_affine,
    apply_random_flip,
    compute_detector_losses,
    make_negatives,
)
from openpulid.training.rng import StepRNG


@pytest.fixture(scope="module")
def photos():
    return negatives.load_photographs()


@pytest.fixture
def task(small_world, photos):
    torch.manual_seed(0)
    return DetectorTask(
        MiniFaceDetector((8, 8, 16, 16, 16)),
        small_world,
        small_world,
        photos,
        positives=6,
        negatives=6,
    )


def make_spots(seed: int = 0) -> DetectorBatch:
    """Make black images with a white spot, labeled as a part, at each landmark."""
    generator = torch.Generator().manual_seed(seed)
    landmarks = 35 + 26 * torch.rand(6, 5, 2, generator=generator)
    landmarks[:, 1, 0] = landmarks[:, 0, 0] + 20
    axis = torch.arange(96) + 0.5
    x, y = landmarks[..., 0, None, None], landmarks[..., 1, None, None]
    bright = (-((axis - x) ** 2 + (axis[:, None] - y) ** 2) / 4).exp().amax(1)
    return DetectorBatch(
        bright[:, None].repeat(1, 3, 1, 1),
        torch.ones(6, dtype=torch.bool),
        landmarks,
        (bright > 0.3).float(),
    )


@pytest.mark.parametrize("change", [apply_random_affine, apply_random_flip])
def test_landmarks_and_parts_follow_the_image(change):
    batch = change(make_spots(), torch.Generator().manual_seed(1))
    for image, landmarks, parts in zip(batch.images, batch.landmarks, batch.parts, strict=True):
        for x, y in landmarks.long().tolist():
            assert image[:, y - 1 : y + 2, x - 1 : x + 2].max() > 0.75
            assert parts[y, x] == 1


def test_flip_keeps_left_landmarks_left():
    batch = apply_random_flip(make_spots(), torch.Generator().manual_seed(1))
    assert (batch.landmarks[:, 0, 0] < batch.landmarks[:, 1, 0]).all()


def test_batch_contains_positives_and_negatives(task):
    batch = task.sample_batch(np.arange(6), 6, torch.Generator().manual_seed(0))
    assert batch.images.shape == (12, 3, 96, 96) and batch.parts.shape == (12, 96, 96)
    assert batch.real.sum() == 6
    shares = (batch.parts == FACE).float().mean((1, 2))
    assert (shares[batch.real] > 0.05).all() and (shares[~batch.real] == 0).all()


@pytest.mark.parametrize("count", [3, 9, 24])
def test_make_negatives_returns_requested_count(small_world, photos, count):
    images = torch.from_numpy(small_world.images).float() / 255
    parts = torch.from_numpy(small_world.parts).float()
    for available in (photos, {}):
        negative, labels = make_negatives(
            images, parts, available, count, torch.Generator().manual_seed(0)
        )
        assert negative.shape == (count, 3, 96, 96) and labels.shape == (count, 96, 96)
        assert negative.min() >= 0 and negative.max() <= 1


def test_some_photographs_of_installed_packages_are_held_out(task, photos):
    assert {"astronaut", "grace_hopper", "chelsea", "face-0"} <= set(photos)
    assert all(image.dtype == torch.uint8 and image.shape[0] == 3 for image in photos.values())
    assert not set(task.photos) & set(task.held_out_photos)


def test_losses_are_deterministic_and_reach_all_parameters(task):
    first, second = (task.losses(StepRNG(0, 3)) for _ in range(2))
    assert set(first) == {"score", "landmarks", "parts"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    sum(first.values()).backward()
    assert all(p.grad is not None for p in task.detector.parameters())


def test_perfect_detection_has_no_loss():
    batch = make_spots()
    parts = torch.nn.functional.one_hot(batch.parts.long(), 8).permute(0, 3, 1, 2) * 100.0
    detection = MiniDetection(torch.full((6,), 50.0), torch.zeros(6, 4), batch.landmarks, parts)
    losses = compute_detector_losses(
        detection, DetectorBatch(batch.images, batch.real, batch.landmarks, batch.parts.long())
    )
    assert all(loss < 1e-6 for loss in losses.values())


def test_training_reduces_loss(task):
    optimizer = torch.optim.AdamW(task.detector.parameters(), lr=5e-3)
    totals = []
    for step in range(15):
        losses = task.losses(StepRNG(0, step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        totals.append(sum(losses.values()).item())
    assert np.mean(totals[-4:]) < 0.75 * np.mean(totals[:3])
    task.detector.eval()
    metrics = task.validate()
    assert set(metrics) == {"landmarks", "landmarks_p95", "iou", "found", "refused"}
    assert metrics["landmarks"] < 0.5
    assert task.sheet().size == (960, 384)
