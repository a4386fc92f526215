"""Real photographs, a real detector: every face is found, and everything that is known of a person comes from one face."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from facexlib.parsing.bisenet import BiSeNet
from torch import Tensor

from openpulid.errors import WeightsError
from openpulid.faces.arcface import ArcFaceRecognition
from openpulid.faces.bisenet import CROP, TEMPLATE, FaceParser, align_photo
from openpulid.faces.face import Face
from openpulid.faces.insightface_pack import find_pack, select_providers, to_uint8
from openpulid.faces.scrfd import BORDER, SCRFDDetector
from openpulid.faces.select import sort_faces
from openpulid.io.images import open_image
from tests.support.photo_networks import DETECTOR, GROUP, PHOTOS, needs_detector, recogniser_file


def opened(path: Path) -> Tensor:
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def finder() -> SCRFDDetector:
    return SCRFDDetector.load(DETECTOR)


@pytest.fixture(scope="module")
def group() -> Tensor:
    return opened(GROUP)


@pytest.fixture(scope="module")
def astronaut() -> Tensor:
    return torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255


@needs_detector
@pytest.mark.parametrize(
    "name", ["hinton", "lecun", "lifeifei", "liuyifei", "pengwei", "rihanna", "zcy"]
)
def test_every_photo_gives_its_face(finder, name) -> None:
    image = opened(next(PHOTOS.glob(f"{name}.*")))
    faces = finder.find(image)
    assert len(faces) == 1 and faces[0].score > 0.7 and faces[0].mask is None
    x1, y1, x2, y2 = faces[0].box
    assert 0 <= x1 < x2 <= image.shape[2] and 0 <= y1 < y2 <= image.shape[1]
    five = faces[0].landmarks
    assert ((five >= torch.stack([x1, y1])) & (five <= torch.stack([x2, y2]))).all()
    assert (
        five[0, 0] < five[1, 0]
        and five[3, 0] < five[4, 0]
        and five[:2, 1].max() < five[3:, 1].min()
    )
    tight = image[:, int(y1) : int(y2), int(x1) : int(x2)]
    again = finder.find(tight)
    assert len(again) == 1
    width = x2 - x1
    assert (again[0].landmarks + torch.stack([x1.floor(), y1.floor()]) - five).norm(
        dim=1
    ).max() < 0.1 * width


@needs_detector
def test_the_astronaut(finder, astronaut) -> None:
    (face,) = finder.find(astronaut)
    assert torch.allclose(
        face.landmarks[:2], torch.tensor([[205.0, 101.0], [248.0, 104.0]]), atol=4
    )


@needs_detector
def test_six_people(finder, group) -> None:
    faces = finder.find(group)
    assert len(faces) == 6 and [f.area for f in faces] == sorted(
        (f.area for f in faces), reverse=True
    )
    across = [float(f.box[0]) for f in sort_faces(faces, "left-right")]
    assert across == sorted(across)


@needs_detector
def test_a_tight_crop_a_border_and_nothing_at_all(finder, astronaut) -> None:
    (face,) = finder.find(astronaut)
    x1, y1, x2, y2 = (int(v) for v in face.box)
    assert len(finder.find(astronaut[:, y1 + 8 : y2 - 3, x1 + 3 : x2 - 3])) == 1
    margin = 256  # what is found on a copy with a border lies in the picture's own pixels
    around = torch.nn.functional.pad(astronaut, (margin,) * 4, value=0.5)
    (again,) = finder._at(astronaut, around, 640, margin)
    assert (again.landmarks - face.landmarks).abs().max() < 5 and again.image is astronaut
    assert finder.find(torch.full((3, 200, 300), 0.5)) == []
    assert finder.tried == "sizes 640, 512, 384, 256 and a copy with a border"


@needs_detector
def test_the_crop_has_the_landmarks_in_their_places(finder, astronaut) -> None:
    (face,) = finder.find(astronaut)
    crop = align_photo(face)
    assert crop.shape == (1, 3, CROP, CROP)
    (again,) = finder.find(crop[0])
    assert (again.landmarks - 0.5 - torch.tensor(TEMPLATE)).norm(dim=1).max() < 25  # she smiles


def test_a_crop_is_exact_where_the_landmarks_are() -> None:
    image = torch.rand(3, 700, 800, generator=torch.Generator().manual_seed(0))
    face = Face(
        image,
        torch.tensor([0.0, 0, 1, 1]),
        torch.tensor(TEMPLATE) + 0.5 + torch.tensor([100.0, 60.0]),
        1.0,
    )
    crop = align_photo(face)  # the transform is a shift by whole pixels
    assert (
        np.abs(
            to_uint8(crop[0]).astype(int) - to_uint8(image[:, 60:572, 100:612]).astype(int)
        ).max()
        <= 1
    )
    outside = align_photo(Face(image, face.box, torch.tensor(TEMPLATE) - 200, 1.0))
    assert to_uint8(outside[0])[0, 0].tolist() == [132, 133, 135]


@needs_detector
def test_an_embedding_is_of_one_face(finder, group, tmp_path) -> None:
    recogniser = ArcFaceRecognition.load(recogniser_file(tmp_path / "glintr100.onnx"))
    first, second, *_ = finder.find(group)
    one = recogniser(first)
    assert (
        one.shape == (1, 512) and one.dtype == torch.float32 and torch.equal(one, recogniser(first))
    )
    assert not torch.allclose(one, recogniser(second))
    elsewhere = group.clone()
    elsewhere[:, :, int(first.box[2]) + 60 :] = 0
    moved = Face(elsewhere, first.box, first.landmarks, first.score)
    assert torch.equal(one, recogniser(moved))


def test_parsing_keeps_what_is_face_or_hair(tmp_path) -> None:
    torch.manual_seed(0)
    network = BiSeNet(num_class=19)
    torch.save(network.state_dict(), tmp_path / "parsing_bisenet.pth")
    parser = FaceParser.load(tmp_path / "parsing_bisenet.pth")
    crop = torch.rand(1, 3, CROP, CROP, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        labels = network.eval()((crop - mean) / std)[0].argmax(1)[0]
    kept = parser(crop)
    assert kept.shape == (1, 1, CROP, CROP)
    for label in labels.unique().tolist():
        assert kept[0, 0][labels == label].unique().tolist() == [
            float(label not in (0, 7, 8, 9, 14, 15, 16, 18))
        ]


def test_files_that_are_missing_or_of_another_kind(tmp_path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.onnx is not there; `pulid weights"):
        SCRFDDetector.load(tmp_path / "nowhere.onnx")
    with pytest.raises(WeightsError, match="another kind"):
        SCRFDDetector.load(recogniser_file(tmp_path / "r.onnx"))
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(WeightsError, match="cannot be opened"):
        ArcFaceRecognition.load(tmp_path / "broken.onnx")
    torch.save({"a": torch.ones(1)}, tmp_path / "parsing.pth")
    with pytest.raises(WeightsError, match="Missing key"):
        FaceParser.load(tmp_path / "parsing.pth")


@needs_detector
def test_a_pack_is_any_folder_of_the_library(tmp_path) -> None:
    (tmp_path / "a.onnx").symlink_to(DETECTOR)
    with pytest.raises(WeightsError, match="no pack of insightface"):
        find_pack(tmp_path)
    recogniser_file(tmp_path / "b.onnx")
    assert find_pack(tmp_path) == (tmp_path / "a.onnx", tmp_path / "b.onnx")
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked" / "antelopev2").symlink_to(
        tmp_path
    )  # as its archive unpacks: a folder in a folder
    assert find_pack(tmp_path / "unpacked") == tuple(
        tmp_path / "unpacked" / "antelopev2" / f"{name}.onnx" for name in "ab"
    )
    with pytest.raises(WeightsError, match="no pack of insightface"):
        find_pack(tmp_path / "nowhere")


def test_smaller_and_smaller_then_with_a_border_until_a_face_is_found() -> None:
    looked: list[tuple[int, int]] = []

    class Blind:
        """Finds one face at its last chance."""

        def detect(
            self, picture: np.ndarray, input_size: tuple[int, int], det_thresh: float
        ) -> tuple[np.ndarray, np.ndarray]:
            looked.append((input_size[0], picture.shape[0]))
            found = int(len(looked) == 8)
            return np.full((found, 5), 60.0, np.float32), np.full((found, 5, 2), 60.0, np.float32)

    (face,) = SCRFDDetector(Blind()).find(torch.zeros(3, 200, 100))
    margin = round(BORDER * 200)
    assert looked == [
        (size, height) for height in (200, 200 + 2 * margin) for size in (640, 512, 384, 256)
    ]
    assert face.landmarks.eq(60.5 - margin).all()  # in the picture's own pixels


def test_a_devices_provider() -> None:
    known = ["CUDAExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"]
    assert (
        select_providers("cuda", ["MIGraphXExecutionProvider", "CPUExecutionProvider"])[0]
        == "MIGraphXExecutionProvider"
    )  # AMD
    assert select_providers("cpu", known) == ["CPUExecutionProvider"]
    assert select_providers(torch.device("mps"), known) == [
        "CoreMLExecutionProvider",
        "CPUExecutionProvider",
    ]
    assert select_providers("mps", ["CPUExecutionProvider"]) == ["CPUExecutionProvider"]
    assert select_providers("cuda:1", ["CUDAExecutionProvider"])[0] == (
        "CUDAExecutionProvider",
        {"device_id": 1},
    )
