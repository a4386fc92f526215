"""The poses of the people in an image: detected, and drawn as OpenPose draws them.

RT-DETR (arXiv 2304.08069) finds the people and ViTPose (arXiv 2204.12484) their joints, both in
transformers' implementation.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from colorsys import hsv_to_rgb
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from openpulid.errors import explain_missing_library
from openpulid.io.networks import describe_load_errors, load_network

MIN_SCORE = 0.3
"""Confidence from which a person or a joint is drawn."""

# COCO's joints in OpenPose's order; its neck, between the shoulders, is missing in COCO.
_COCO = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_SHOULDERS = (5, 6)

# Pairs of joints in the order of their colors: shoulders, arms, legs, head.
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip

_COLORS = [tuple(round(255 * x) for x in hsv_to_rgb(k / 18, 1, 1)) for k in range(18)]


@torch.inference_mode()
def detect_poses(
    image: Image.Image, detector_path: str | os.PathLike[str], path: str | os.PathLike[str]
) -> np.ndarray:
    """Detect the joints of the people in an image.

    Args:
        image: RGB.
        detector_path: directory of the person detector, with its image processor.
        path: directory of the pose network, with its image processor.

    Returns:
        (people, 17, 3): x and y in pixels, and the confidence, of the joints in COCO's order.

    Raises:
        WeightsError: a directory has no such network, or its files are damaged.
    """
    # transformers loads the module of every model that is named, which takes seconds
    from transformers import RTDetrForObjectDetection, VitPoseForPoseEstimation

    detector, processor = _load(RTDetrForObjectDetection, Path(detector_path))
    outputs = detector(**processor(images=image, return_tensors="pt"))
    (found,) = processor.post_process_object_detection(
        outputs, target_sizes=[(image.height, image.width)], threshold=MIN_SCORE
    )
    names = detector.config.id2label
    is_person = [names[int(label)] == "person" for label in found["labels"]]
    corners = found["boxes"][torch.tensor(is_person, dtype=torch.bool)]
    if not len(corners):
        return np.zeros((0, 17, 3), np.float32)
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).numpy()

    network, processor = _load(VitPoseForPoseEstimation, Path(path))
    inputs = processor(images=image, boxes=[boxes], return_tensors="pt")
    (poses,) = processor.post_process_pose_estimation(network(**inputs), boxes=[boxes])
    joints = [torch.cat([pose["keypoints"], pose["scores"][:, None]], dim=1) for pose in poses]
    return torch.stack(joints).numpy()


def _load(cls: Any, folder: Path) -> tuple[Any, Any]:
    """Load a network of transformers and its image processor."""
    from transformers import AutoImageProcessor

    network = load_network(cls, folder, torch.float32).eval()
    with describe_load_errors(folder):
        return network, AutoImageProcessor.from_pretrained(folder, local_files_only=True)


def draw_poses(people: Iterable[np.ndarray], size: tuple[int, int]) -> Image.Image:
    """Draw the joints of people as OpenPose does, which ControlNets for poses were trained on.

    Args:
        people: (17, 3) each, see `detect_poses`.
        size: width and height of the image in pixels.

    Returns:
        Colored limbs and joints on black, in RGB.
    """
    with explain_missing_library():
        import cv2

    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    width = max(1, round(min(size) / 128))  # 4 pixels at 512, as in the training
    for person in people:
        joints = _order_joints(person)
        for (first, second), color in zip(_LIMBS, _COLORS, strict=False):
            start, end = joints[first], joints[second]
            if start is None or end is None:
                continue
            middle = tuple(int(x) for x in (start + end) / 2)
            length = float(np.hypot(*(end - start)))
            angle = int(np.degrees(np.arctan2(*(start - end)[::-1])))
            polygon = cv2.ellipse2Poly(middle, (int(length / 2), width), angle, 0, 360, 1)
            cv2.fillConvexPoly(canvas, polygon, [int(0.6 * value) for value in color])
        for joint, color in zip(joints, _COLORS, strict=True):
            if joint is not None:
                cv2.circle(canvas, tuple(int(x) for x in joint), width, color, thickness=-1)
    return Image.fromarray(canvas)


def _order_joints(person: np.ndarray) -> list[np.ndarray | None]:
    """Return the 18 joints of OpenPose, x and y; None for a joint that is not visible."""
    points = [joint[:2] if joint[2] >= MIN_SCORE else None for joint in person]
    shoulders = [points[k] for k in _SHOULDERS]
    neck = None
    if shoulders[0] is not None and shoulders[1] is not None:
        neck = (shoulders[0] + shoulders[1]) / 2
    return [neck if k is None else points[k] for k in _COCO]
