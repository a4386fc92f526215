"""Control images: recognized by their content, and detected in plain images."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from transformers import (
    DepthAnythingForDepthEstimation,
    DPTImageProcessor,
    RTDetrForObjectDetection,
    RTDetrImageProcessor,
    pipeline,
)

from openpulid.errors import WeightsError
from openpulid.io.images import open_image
from openpulid.methods.control_maps.depth import estimate_depth
from openpulid.methods.control_maps.edges import canny_edges
from openpulid.methods.control_maps.pose import detect_poses, draw_poses
from openpulid.methods.control_maps.recognition import is_control_map
from tests.support.map_networks import save_depth_estimator, save_pose_models
from tests.support.photo_networks import PHOTOS

KINDS = ("edges", "depth", "pose")
PORTRAITS = sorted(PHOTOS.glob("*.[jpw]*"))

STANDING = [
    (0.50, 0.12), (0.53, 0.10), (0.47, 0.10), (0.56, 0.11), (0.44, 0.11), (0.62, 0.25),
    (0.38, 0.25), (0.68, 0.42), (0.32, 0.42), (0.70, 0.55), (0.30, 0.55), (0.58, 0.55),
    (0.42, 0.55), (0.59, 0.75), (0.41, 0.75), (0.60, 0.95), (0.40, 0.95),
]  # fmt: skip
"""COCO's joints of a person from the front, in fractions of the image."""


def jpeg(image: Image.Image) -> Image.Image:
    data = BytesIO()
    image.save(data, "JPEG", quality=85)
    return Image.open(data).convert("RGB")


def gray(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def render_depth(seed: int, width: int = 640, height: int = 480) -> Image.Image:
    """Render rounded bodies in front of a floor; what is near is white."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    nearness = 0.5 * (y / height) ** 2
    for _ in range(4):
        center = rng.uniform(0, width), rng.uniform(0.2, 1) * height
        radii = rng.uniform(0.05, 0.3) * width, rng.uniform(0.1, 0.5) * height
        inside = 1 - ((x - center[0]) / radii[0]) ** 2 - ((y - center[1]) / radii[1]) ** 2
        body = rng.uniform(0.3, 1) * (0.8 + 0.2 * np.sqrt(inside.clip(0)))
        nearness = np.where(inside > 0, np.maximum(nearness, body), nearness)
    pixels = Image.fromarray((255 * nearness / nearness.max()).astype(np.uint8))
    return pixels.filter(ImageFilter.GaussianBlur(1)).convert("RGB")


def draw_crowd(seed: int, size: tuple[int, int]) -> Image.Image:
    rng = np.random.default_rng(seed)
    people = []
    for _ in range(1 + seed % 3):
        joints = np.array(STANDING) + rng.normal(0, 0.02, (17, 2))
        joints = joints * rng.uniform(0.4, 1) + rng.uniform(0, 0.4, 2)
        scores = rng.uniform(0.2, 1, (17, 1))
        people.append(np.concatenate([joints * size, scores], axis=1))
    return draw_poses(people, size)


@pytest.fixture(scope="module")
def depth_estimator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_depth_estimator(tmp_path_factory.mktemp("depth"))


@pytest.fixture(scope="module")
def pose_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pose_models(tmp_path_factory.mktemp("poses"))


def recognized(image: Image.Image) -> list[str]:
    return [kind for kind in KINDS if is_control_map(kind, image)]


VARIANTS: dict[str, tuple[Callable[[Image.Image], Image.Image], list[str]]] = {
    "photo": (lambda photo: photo, []),
    "gray photo": (gray, []),
    "edges": (canny_edges, ["edges"]),
    "weak edges": (lambda photo: canny_edges(photo, 30, 80), ["edges"]),
    "edges as JPEG": (lambda photo: jpeg(canny_edges(photo)), ["edges"]),
    "edges at half the size": (
        lambda photo: canny_edges(photo).resize((photo.width // 2, photo.height // 2)),
        ["edges"],
    ),
    "pose": (lambda photo: draw_crowd(photo.width, photo.size), ["pose"]),
    "pose as JPEG": (lambda photo: jpeg(draw_crowd(photo.width, photo.size)), ["pose"]),
}


@pytest.mark.skipif(not PORTRAITS, reason="the photos in shared are not available")
@pytest.mark.parametrize("variant", VARIANTS)
def test_maps_of_photos_are_recognized(variant: str) -> None:
    change, expected = VARIANTS[variant]
    found = {}
    for path in PORTRAITS:
        photo = open_image(path)
        photo.thumbnail((1024, 1024))
        found[path.name] = recognized(change(photo))
    assert found == dict.fromkeys(found, expected)


def test_depth_maps_are_recognized() -> None:
    for seed in range(6):
        depth = render_depth(seed)
        two_levels = depth.point(lambda value: 235 if value > 140 else 12)
        for image in (depth, jpeg(depth), two_levels.filter(ImageFilter.GaussianBlur(2))):
            assert recognized(image) == ["depth"], seed


def test_empty_images_are_no_maps() -> None:
    for color in ("black", "gray", "white", "red"):
        assert recognized(Image.new("RGB", (64, 48), color)) == []
    square = Image.new("RGB", (96, 96))
    square.paste("orange", (20, 20, 70, 70))
    assert recognized(square) == []
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    assert recognized(Image.fromarray(noise)) == [] == recognized(gray(Image.fromarray(noise)))


def test_edges_of_a_square() -> None:
    image = Image.new("RGB", (96, 96))
    image.paste("white", (20, 20, 70, 70))
    edges = canny_edges(image)
    assert max(edges.getpixel((x, 40)) for x in (18, 19, 20, 21)) == (255, 255, 255)
    assert edges.getpixel((45, 45)) == (0, 0, 0) and recognized(edges) == ["edges"]


# -- networks with random weights, in the classes of the published ones


def test_depth_equals_that_of_transformers(depth_estimator: Path) -> None:
    image = render_depth(3, 80, 56).convert("RGB")
    image.paste("red", (10, 10, 40, 30))
    depth = estimate_depth(image, depth_estimator)
    theirs = pipeline("depth-estimation", model=str(depth_estimator), device="cpu")(image)["depth"]
    difference = np.asarray(depth.convert("L")).astype(int) - np.asarray(theirs)
    assert depth.size == image.size and depth.mode == "RGB"
    assert abs(difference).max() <= 1  # they round down
    assert depth.convert("L").getextrema() == (0, 255)


def test_flat_depth_is_black(depth_estimator: Path, tmp_path: Path) -> None:
    network = DepthAnythingForDepthEstimation.from_pretrained(depth_estimator)
    torch.nn.init.zeros_(network.head.conv3.weight)
    torch.nn.init.zeros_(network.head.conv3.bias)
    network.save_pretrained(tmp_path)
    DPTImageProcessor.from_pretrained(depth_estimator).save_pretrained(tmp_path)
    depth = estimate_depth(Image.new("RGB", (60, 50)), tmp_path)
    assert depth.getextrema() == ((0, 0),) * 3


def test_poses_are_detected(pose_models: tuple[Path, Path], tmp_path: Path) -> None:
    image = render_depth(1, 120, 80)
    people = detect_poses(image, *pose_models)
    assert people.shape == (4, 17, 3) and np.isfinite(people).all()
    assert np.array_equal(people, detect_poses(image, *pose_models))
    detector = RTDetrForObjectDetection.from_pretrained(pose_models[0])
    detector.config.id2label = {0: "dog", 1: "person"}
    detector.save_pretrained(tmp_path)
    RTDetrImageProcessor.from_pretrained(pose_models[0]).save_pretrained(tmp_path)
    assert detect_poses(image, tmp_path, pose_models[1]).shape == (0, 17, 3)


def test_pose_is_drawn_as_openpose_does() -> None:
    joints = np.concatenate([np.array(STANDING) * (512, 768), np.ones((17, 1))], axis=1)
    image = draw_poses([joints], (512, 768))

    def color(x: float, y: float) -> tuple[int, ...]:
        return image.getpixel((int(x), int(y)))

    assert color(*joints[0, :2]) == (255, 0, 0)  # nose
    shoulders = joints[5:7, :2]
    assert color(*shoulders.mean(0)) == (255, 85, 0)  # neck
    # limbs are darker than joints: neck to nose, right upper arm
    assert color(*(shoulders.mean(0) + joints[0, :2]) / 2) == (0, 0, 153)
    right = joints[[6, 8], :2].mean(0)
    assert color(*right) == (153, 102, 0)
    joints[0, 2] = 0.1  # not visible
    hidden = np.asarray(draw_poses([joints], (512, 768)))
    assert (hidden.reshape(-1, 3) != (255, 0, 0)).any(1).all()


@pytest.mark.parametrize("which", ["depth", "detector", "pose"])
def test_damaged_detector_is_one_sentence(
    which: str, depth_estimator: Path, pose_models: tuple[Path, Path], tmp_path: Path
) -> None:
    image = Image.new("RGB", (64, 64))

    def detect(empty: Path) -> Any:
        if which == "depth":
            return estimate_depth(image, empty)
        detector, pose = pose_models
        return detect_poses(image, *((empty, pose) if which == "detector" else (detector, empty)))

    with pytest.raises(WeightsError, match="lacks config"):
        detect(tmp_path)
    sources = {"depth": depth_estimator, "detector": pose_models[0], "pose": pose_models[1]}
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((sources[which] / file).read_bytes())
    with pytest.raises(WeightsError, match="cannot be loaded"):
        detect(tmp_path)  # without its image processor
