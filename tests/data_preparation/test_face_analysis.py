"""Faces of images: measurements, filters, embeddings, and the crop."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image

from openpulid.data import stages
from openpulid.data.cropping import crop_image
from openpulid.data.decode import CHILD_SECONDS, decode_image
from openpulid.data.face_analysis import FaceAnalyzer
from openpulid.data.face_models import PhotoFaceModels
from openpulid.data.models import check_models, load_face_models
from openpulid.data.options import MINI_OPTIONS, Filters, PrepareOptions
from openpulid.data.records import ImageRecord
from openpulid.data.sources import find_sources
from openpulid.data.stages import FacesStage
from openpulid.data.work_folder import FACES, WorkFolder
from openpulid.errors import FaceError, OptionError, WeightsError
from openpulid.faces.arcface import ArcFaceRecognition
from openpulid.faces.bisenet import load_face_parser
from openpulid.faces.face import Face
from openpulid.identity.detection import PhotoFaceDetection
from openpulid.io.hub import FOLDER_VARIABLE
from openpulid.io.image_grid import to_pil
from openpulid.io.images import open_image
from openpulid.world.person import Person
from openpulid.world.render import render
from openpulid.world.scene import Scene
from tests.support.photo_networks import (
    NOSE_CELL,
    PHOTOS,
    YUNET,
    needs_yunet,
    recognition_file,
    selfie_file,
    yunet_file,
)

SCENE = {"style": "photo", "light": "studio", "glasses": "none", "hat": "none", "beard": "none"}


@pytest.fixture(scope="module")
def mini() -> FaceAnalyzer:
    return FaceAnalyzer(load_face_models(MINI_OPTIONS, "cpu"), MINI_OPTIONS.filters)


def portrait(seed: int = 1_000_000, pose: str = "front", size: int = 96) -> Image.Image:
    scene = Scene.sample(torch.Generator().manual_seed(0), pose=pose, **SCENE)
    return to_pil(render([Person.from_seed(seed)], [scene], size=size).image)[0]


def analyze(analyzer: FaceAnalyzer, image: Image.Image) -> ImageRecord:
    record = ImageRecord("a.png", "0")
    analyzer.analyze(record, image)
    return record


def test_portrait_is_kept(mini) -> None:
    record = analyze(mini, portrait())
    assert record.is_kept and record.num_faces == 1
    assert record.face_size is not None and 32 < record.face_size < 96
    assert record.occlusion is not None and record.occlusion < 0.2
    assert abs(record.yaw or 90) < 20
    assert math.hypot(*record.embedding) == pytest.approx(1, abs=1e-5)
    other = analyze(mini, portrait(1_000_050))
    again = analyze(mini, portrait(pose="left"))
    same, strangers = (np.dot(record.embedding, x.embedding) for x in (again, other))
    assert same > strangers + 0.2


@pytest.mark.parametrize(
    ("changes", "decision"),
    [
        ({"min_face": 90}, "small_face"),
        ({"min_sharpness": 0.99}, "blurred"),
        ({"max_yaw": 20.0}, "pose"),
        ({"max_occlusion": 1.0}, "kept"),
    ],
)
def test_every_threshold_decides(mini, changes: dict[str, float], decision: str) -> None:
    analyzer = FaceAnalyzer(mini.models, replace(mini.filters, **changes))
    record = analyze(analyzer, portrait(pose="left"))
    assert record.decision == decision
    assert record.occlusion is None
    assert bool(record.embedding) == (decision == "kept")


def test_image_without_face_with_two_and_turned(mini) -> None:
    assert analyze(mini, Image.new("RGB", (96, 96), "gray")).decision == "no_face"
    pair = Image.new("RGB", (192, 96))
    pair.paste(portrait(), (0, 0))
    pair.paste(portrait(1_000_050), (96, 0))
    assert analyze(mini, pair).decision == "many_faces"
    turned = portrait().transpose(Image.Transpose.ROTATE_180)
    assert analyze(mini, turned).decision == "turned"


def test_crop_follows_the_face() -> None:
    image = Image.effect_noise((1200, 900), 50).convert("RGB")
    options = PrepareOptions(size=256, context=4)
    record = ImageRecord("a", "0", box=[800, 100, 900, 200], landmarks=[850.0, 150.0] * 5)
    # four faces are 400 pixels, so the crop is too small
    assert crop_image(image, record, options) is None and record.decision == "small_crop"

    options = replace(options, filters=Filters(min_side=256))
    record = replace(record, decision="kept")
    content = crop_image(image, record, options)
    assert content is not None
    crop = Image.open(io.BytesIO(content))
    assert crop.size == (record.crop_width, record.crop_height) == (341, 256)
    # as the image, but never beyond its border
    scale = 256 / 400
    corner = np.array([850 - 533 / 2, 0])
    assert record.box == pytest.approx(
        [(800 - corner[0]) * scale, 100 * scale, (900 - corner[0]) * scale, 200 * scale], abs=1
    )
    assert record.landmarks[:2] == pytest.approx([(850 - corner[0]) * scale, 150 * scale], abs=1)


def test_crop_of_a_panorama_is_two_to_one_and_not_enlarged() -> None:
    image = Image.new("RGB", (900, 300), "gray")
    options = PrepareOptions(filters=Filters(min_side=100))
    record = ImageRecord("a", "0", box=[0, 0, 200, 300], landmarks=[0.0] * 10)
    assert crop_image(image, record, options) is not None
    assert (record.crop_width, record.crop_height) == (600, 300)
    assert record.box == [0, 0, 200, 300]


def open_faces(folder: Path) -> PhotoFaceModels:
    return PhotoFaceModels(
        PhotoFaceDetection.load(yunet_file(folder / "yunet.onnx"), "cpu"),
        ArcFaceRecognition.load(recognition_file(folder / "glintr100.onnx", dim=12)),
        load_face_parser(selfie_file(folder / "model.onnx")),
    )


def test_photo_models_measure_hidden_part(tmp_path) -> None:
    """The small parser takes red for skin, blue for hair, and green for clothes."""
    models = open_faces(tmp_path)
    image = np.zeros((512, 512, 3), np.uint8)
    image[128:352, 128:352, 2] = 200
    image[8 * NOSE_CELL : 9 * NOSE_CELL, 8 * NOSE_CELL : 9 * NOSE_CELL] = (255, 0, 0)
    analyzer = FaceAnalyzer(models, Filters(min_face=64, min_sharpness=0, max_occlusion=0.2))
    red = analyze(analyzer, Image.fromarray(image))
    image[128:352, 128:256] = (0, 200, 0)  # left of the nose
    masked = analyze(analyzer, Image.fromarray(image))
    assert red.occlusion is not None and red.occlusion < 0.05, red
    assert masked.occlusion is not None and 0.2 < masked.occlusion < 1, masked
    assert len(red.embedding) == 12 and not masked.embedding
    assert red.is_kept and masked.decision == "occluded"
    assert red.score is not None and 0.9 < red.score < 1
    strict = FaceAnalyzer(models, replace(analyzer.filters, min_score=1.0))
    image[8 * NOSE_CELL : 9 * NOSE_CELL, 8 * NOSE_CELL : 9 * NOSE_CELL] = (250, 0, 0)
    assert analyze(strict, Image.fromarray(image)).decision == "uncertain_face"


@needs_yunet
def test_photos_are_kept(tmp_path) -> None:
    models = open_faces(tmp_path)
    models.detection = PhotoFaceDetection.load(YUNET, "cpu")
    analyzer = FaceAnalyzer(models, Filters(max_occlusion=1))
    for name in ("lifeifei.jpg", "pengwei.jpg"):
        image = open_image(PHOTOS / name)
        record = analyze(analyzer, image)
        assert record.is_kept, record
        # the detector reads a smaller image
        large = analyze(analyzer, image.resize((3 * image.width, 3 * image.height)))
        assert large.box == pytest.approx([3 * value for value in record.box], abs=30)
        assert large.landmarks == pytest.approx([3 * x for x in record.landmarks], abs=20)


def test_face_that_cannot_be_aligned_is_dropped(tmp_path, monkeypatch) -> None:
    def fail(face: Face) -> torch.Tensor:
        raise FaceError("the landmarks are at one point")

    portrait().save(tmp_path / "a.png")
    images = find_sources([tmp_path])
    table = pyarrow.Table.from_pylist([image.to_row() for image in images])
    work = WorkFolder(tmp_path / "work")
    work.create()
    stage = FacesStage(MINI_OPTIONS, work)
    monkeypatch.setattr(stage.analyzer.models, "embed", fail)
    stage(table)
    (record,) = work.read_batches(FACES, images).values()
    assert record.decision == "uncertain_face" and not record.file


def test_batch_that_killed_a_worker_is_decoded_in_child_processes(tmp_path, monkeypatch) -> None:
    portrait().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    images = find_sources([tmp_path])
    table = pyarrow.Table.from_pylist([image.to_row() for image in images])
    work = WorkFolder(tmp_path / "work")
    work.create()
    stage = FacesStage(MINI_OPTIONS, work)
    limits: list[float | None] = []

    def decode(*arguments: Any, time_limit: float | None, **options: Any) -> Any:
        limits.append(time_limit)
        return decode_image(*arguments, time_limit=time_limit, **options)

    monkeypatch.setattr(stages, "decode_image", decode)
    assert stage(table)["count"].to_pylist() == [2]
    first = work.read_batches(FACES, images)
    assert stage(table)["count"].to_pylist() == [2]
    assert limits == [None, None, CHILD_SECONDS, CHILD_SECONDS]
    assert work.read_batches(FACES, images) == first
    assert sorted(record.decision for record in first.values()) == ["kept", "unreadable"]


def test_missing_models_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(WeightsError, match="`pulid weights get"):
        check_models(PrepareOptions(), needs_captioner=False)
    with pytest.raises(WeightsError, match="`pulid weights get blip2` downloads it"):
        check_models(MINI_OPTIONS, needs_captioner=True)
    assert len(check_models(MINI_OPTIONS, needs_captioner=False)) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 1.5}, "--held-out must be from 0 to 0.9, got 1.5"),
        ({"filters": Filters(max_yaw=100)}, "--max-yaw must be from 0 to 90, got 100"),
    ],
)
def test_option_out_of_range_is_one_sentence(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PrepareOptions(**options)
