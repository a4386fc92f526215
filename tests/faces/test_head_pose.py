"""The pose of a head from five landmarks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from openpulid.faces.arcface import ARCFACE_TEMPLATE
from openpulid.faces.head_pose import NOSE_LENGTH, HeadPose, estimate_head_pose
from openpulid.faces.photo_detector import load_photo_detector
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import limit_size, open_image
from tests.support.photo_networks import PHOTOS, YUNET, needs_yunet


def project(yaw: float, pitch: float, roll: float) -> torch.Tensor:
    """Return the landmarks of a head with the template's proportions, without perspective."""
    template = ARCFACE_TEMPLATE.double().numpy()
    points = np.zeros((5, 3))
    points[:, :2] = template - template.mean(0)
    points[2, 2] = -NOSE_LENGTH * (template[1, 0] - template[0, 0])
    y, p, r = np.radians([yaw, pitch, roll])
    turn_x = [[1, 0, 0], [0, np.cos(p), np.sin(p)], [0, -np.sin(p), np.cos(p)]]
    turn_y = [[np.cos(y), 0, -np.sin(y)], [0, 1, 0], [np.sin(y), 0, np.cos(y)]]
    turn_z = [[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]]
    turned = points @ (np.array(turn_z) @ turn_y @ turn_x).T
    return torch.from_numpy(2 * turned[:, :2] + 100)


@pytest.mark.parametrize(
    "pose",
    [(0, 0, 0), (30, 0, 0), (-45, 0, 0), (0, 20, 0), (0, -20, 0), (0, 0, 35), (20, 10, -20)],
)
def test_known_pose_is_estimated(pose: tuple[float, float, float]) -> None:
    assert estimate_head_pose(project(*pose)) == pytest.approx(pose, abs=2)


def test_width_of_a_face_does_not_turn_it() -> None:
    landmarks = project(0, 0, 0) * torch.tensor([0.9, 1.0])
    assert estimate_head_pose(landmarks) == pytest.approx((0, 0, 0), abs=1)


@pytest.mark.parametrize("landmarks", [torch.zeros(5, 2), torch.full((5, 2), math.nan)])
def test_landmarks_at_one_point_have_no_pose(landmarks: torch.Tensor) -> None:
    assert all(math.isnan(angle) for angle in estimate_head_pose(landmarks))


@needs_yunet
def test_poses_of_photos() -> None:
    poses: dict[str, HeadPose] = {}
    detector = load_photo_detector(YUNET)
    for name in ("pengwei.jpg", "hinton.jpeg", "lecun.jpg"):
        image = limit_size(open_image(PHOTOS / name), 1024)
        poses[name] = estimate_head_pose(detector.detect(to_tensor([image])[0])[0].landmarks)
    assert poses["pengwei.jpg"].yaw == pytest.approx(0, abs=8)
    assert poses["hinton.jpeg"].yaw < -10 and poses["lecun.jpg"].yaw > 10
