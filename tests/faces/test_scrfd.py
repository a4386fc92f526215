"""Real photos with a real detector: detection, alignment, parsing and recognition of faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from facexlib.parsing.bisenet import BiSeNet
from PIL import Image
from torch import Tensor

from openpulid.errors import FaceError, WeightsError
from openpulid.faces import multi_scale
from openpulid.faces.arcface import ARCFACE_TEMPLATE, ArcFaceRecognition, build_face_embedder
from openpulid.faces.bisenet import CROP, TEMPLATE, FaceParser, align_photo
from openpulid.faces.face import Face, sort_faces
from openpulid.faces.insightface_pack import find_pack, select_providers, to_uint8
from openpulid.faces.multi_scale import BORDERS, INPUT
from openpulid.faces.scrfd import SCRFDDetector
from openpulid.identity.clip_extractor import ClipExtractor
from openpulid.identity.detection import PhotoFaceDetection
from openpulid.identity.reference import ReferenceFaces
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import open_image
from tests.support.image_files import IMAGES
from tests.support.photo_networks import DETECTOR, GROUP, PHOTOS, needs_detector, recognition_file


def load_image(path: Path) -> Tensor:
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def detector() -> SCRFDDetector:
    return SCRFDDetector.load(DETECTOR)


@pytest.fixture(scope="module")
def group() -> Tensor:
    return load_image(GROUP)


@pytest.fixture(scope="module")
def astronaut() -> Tensor:
    return torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255


@needs_detector
@pytest.mark.parametrize(
    "name", ["hinton", "lecun", "lifeifei", "liuyifei", "pengwei", "rihanna", "zcy"]
)
def test_one_face_per_photo(detector, name) -> None:
    image = load_image(next(PHOTOS.glob(f"{name}.*")))
    faces = detector.detect(image)
    assert len(faces) == 1 and faces[0].score > 0.7 and faces[0].mask is None
    x1, y1, x2, y2 = faces[0].box
    assert 0 <= x1 < x2 <= image.shape[2] and 0 <= y1 < y2 <= image.shape[1]
    landmarks = faces[0].landmarks
    assert ((landmarks >= torch.stack([x1, y1])) & (landmarks <= torch.stack([x2, y2]))).all()
    assert (
        landmarks[0, 0] < landmarks[1, 0]
        and landmarks[3, 0] < landmarks[4, 0]
        and landmarks[:2, 1].max() < landmarks[3:, 1].min()
    )
    tight = image[:, int(y1) : int(y2), int(x1) : int(x2)]
    again = detector.detect(tight)
    assert len(again) == 1
    width = x2 - x1
    assert (again[0].landmarks + torch.stack([x1.floor(), y1.floor()]) - landmarks).norm(
        dim=1
    ).max() < 0.1 * width


@needs_detector
def test_landmarks_of_astronaut(detector, astronaut) -> None:
    (face,) = detector.detect(astronaut)
    assert torch.allclose(
        face.landmarks[:2], torch.tensor([[205.0, 101.0], [248.0, 104.0]]), atol=4
    )


@needs_detector
def test_faces_of_group_are_sorted_by_size(detector, group) -> None:
    faces = detector.detect(group)
    assert len(faces) == 6 and [f.area for f in faces] == sorted(
        (f.area for f in faces), reverse=True
    )
    across = [float(f.box[0]) for f in sort_faces(faces, "left-right")]
    assert across == sorted(across)


@needs_detector
def test_tight_crop_border_and_empty_image(detector, astronaut) -> None:
    (face,) = detector.detect(astronaut)
    x1, y1, x2, y2 = (int(v) for v in face.box)
    assert len(detector.detect(astronaut[:, y1 + 8 : y2 - 3, x1 + 3 : x2 - 3])) == 1
    # faces of the copy with a border are in pixels of the image itself
    (again,) = multi_scale._detect_with_border(astronaut, 0.5, detector._detect_once)
    assert (again.landmarks - face.landmarks).abs().max() < 5 and again.image is astronaut
    assert detector.detect(torch.full((3, 200, 300), 0.5)) == []
    assert detector.search_description == "three sizes, in four orientations"


def test_strip_of_less_than_a_pixel_has_no_face() -> None:
    assert SCRFDDetector(LastAttemptModel(0)).detect(torch.zeros(3, 1, 1000)) == []


@needs_detector
def test_aligned_crop_has_template_landmarks(detector, astronaut) -> None:
    (face,) = detector.detect(astronaut)
    crop = align_photo(face)
    assert crop.shape == (1, 3, CROP, CROP)
    (again,) = detector.detect(crop[0])
    assert (again.landmarks - 0.5 - torch.tensor(TEMPLATE)).norm(
        dim=1
    ).max() < 25  # a smile moves the mouth corners


def test_crop_is_exact_for_shifted_template() -> None:
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
def test_embedding_depends_on_one_face(detector, group, tmp_path) -> None:
    recognition = ArcFaceRecognition.load(recognition_file(tmp_path / "glintr100.onnx"))
    first, second, *_ = detector.detect(group)
    one = recognition(first)
    assert (
        one.shape == (1, 512)
        and one.dtype == torch.float32
        and torch.equal(one, recognition(first))
    )
    assert not torch.allclose(one, recognition(second))
    changed = group.clone()
    changed[:, :, int(first.box[2]) + 60 :] = 0
    same_face = Face(changed, first.box, first.landmarks, first.score)
    assert torch.equal(one, recognition(same_face))


def test_parser_keeps_face_and_hair(tmp_path) -> None:
    torch.manual_seed(0)
    network = BiSeNet(num_class=19)
    torch.save(network.state_dict(), tmp_path / "parsing_bisenet.pth")
    parser = FaceParser.load(tmp_path / "parsing_bisenet.pth")
    crop = torch.rand(1, 3, CROP, CROP, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        labels = network.eval()((crop - mean) / std)[0].argmax(1)[0]
    mask = parser(crop)
    assert mask.shape == (1, 1, CROP, CROP)
    for label in labels.unique().tolist():
        assert mask[0, 0][labels == label].unique().tolist() == [
            float(label not in (0, 7, 8, 9, 14, 15, 16, 18))
        ]


def test_unusable_model_file_is_reported(tmp_path, monkeypatch) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.onnx does not exist; `pulid weights"):
        SCRFDDetector.load(tmp_path / "nowhere.onnx")
    with pytest.raises(WeightsError, match="another kind"):
        SCRFDDetector.load(recognition_file(tmp_path / "r.onnx"))
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(WeightsError, match="cannot be opened"):
        ArcFaceRecognition.load(tmp_path / "broken.onnx")

    def fail(*args, **kwargs):
        raise AssertionError

    with monkeypatch.context() as patch, pytest.raises(WeightsError, match=r"\(AssertionError\)"):
        patch.setattr("insightface.model_zoo.get_model", fail)
        ArcFaceRecognition.load(recognition_file(tmp_path / "r.onnx"))
    torch.save({"a": torch.ones(1)}, tmp_path / "parsing.pth")
    with pytest.raises(WeightsError, match="Missing key"):
        FaceParser.load(tmp_path / "parsing.pth")


@needs_detector
def test_pack_is_found_in_folder_or_subfolder(tmp_path) -> None:
    (tmp_path / "a.onnx").symlink_to(DETECTOR)
    with pytest.raises(WeightsError, match="no insightface pack"):
        find_pack(tmp_path)
    recognition_file(tmp_path / "b.onnx")
    assert find_pack(tmp_path) == (tmp_path / "a.onnx", tmp_path / "b.onnx")
    (tmp_path / "unpacked").mkdir()
    (tmp_path / "unpacked" / "antelopev2").symlink_to(
        tmp_path
    )  # the archive unpacks to a folder in a folder
    assert find_pack(tmp_path / "unpacked") == tuple(
        tmp_path / "unpacked" / "antelopev2" / f"{name}.onnx" for name in "ab"
    )
    with pytest.raises(WeightsError, match="no insightface pack"):
        find_pack(tmp_path / "nowhere")


class LastAttemptModel:
    """Detects one face, at the center, in the attempt with a given number."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.shapes: list[tuple[int, ...]] = []

    def detect(
        self, image: np.ndarray, input_size: tuple[int, int], det_thresh: float
    ) -> tuple[np.ndarray, np.ndarray]:
        assert input_size == (INPUT, INPUT)
        self.shapes.append(image.shape[:2])
        count = int(len(self.shapes) == self.attempt)
        middle = np.array(image.shape[1::-1], np.float32) / 2 - 0.5
        box = np.array([[*(middle - 30), *(middle + 30), 0.9]], np.float32)
        return box[:count], np.tile(middle, (count, 5, 1))


def test_detector_tries_smaller_sizes_with_a_border() -> None:
    model = LastAttemptModel(3)
    (face,) = SCRFDDetector(model).detect_upright(torch.zeros(3, 200, 100))
    assert model.shapes == [(200, 100), (INPUT, INPUT), (INPUT, INPUT)]
    assert torch.allclose(face.landmarks, torch.tensor([50.0, 100.0]))  # pixels of the image itself
    size = 60 * (1 + 2 * BORDERS[2]) * 200 / INPUT
    assert abs(face.width - size) < 1


def test_detector_turns_the_image_last() -> None:
    model = LastAttemptModel(4)
    (face,) = SCRFDDetector(model).detect(torch.zeros(3, 200, 100))
    assert model.shapes[3] == (100, 200) and len(model.shapes) == 4 + 1 + 2 * 3
    assert face.turns == 1 and face.image.shape == (3, 200, 100)
    assert torch.allclose(face.landmarks, torch.tensor([50.0, 100.0]))


@needs_detector
def test_close_up_is_preferred_to_a_small_face(detector) -> None:
    """Without a second look, the pasted face is the only one."""
    picture = Image.fromarray(skimage.data.astronaut())
    close_up = picture.crop((170, 60, 280, 210)).resize((880, 1200), Image.Resampling.LANCZOS)
    small = picture.crop((150, 40, 300, 230))
    small.thumbnail((60, 60))
    close_up.paste(small, (5, 5))
    faces = detector.detect(to_tensor([close_up])[0])
    assert len(faces) == 2 and faces[0].width > 440
    expected = torch.tensor([79.0, 74, 803, 959])
    assert (faces[0].box - expected).abs().max() < 60 and faces[1].width < 40
    # a variant: the small face is inside of the box of the large one, and the image is turned
    close_up.paste(small, (420, 1100))
    turned = torch.rot90(to_tensor([close_up])[0], 1, (1, 2))
    assert detector.detect(turned)[0].shorter_side > 440


def test_strip_is_not_resized_to_nothing() -> None:
    """Longer than the detector's input times its width, the image would have a side of 0."""

    class NoFaceModel:
        def detect(
            self, image: np.ndarray, input_size: tuple[int, int], det_thresh: float
        ) -> tuple[np.ndarray, np.ndarray]:
            height, width = image.shape[:2]
            assert int(input_size[0] * min(height, width) / max(height, width)) >= 1
            return np.zeros((0, 5), np.float32), np.zeros((0, 5, 2), np.float32)

    detector = SCRFDDetector(NoFaceModel())
    for shape in ((3, 1024, 1), (3, 1, 1024), (3, 512, 1)):
        assert detector.detect(torch.zeros(shape)) == []


@needs_detector
@pytest.mark.parametrize("size", [None, (16_000, 16), (20, 6000), (17, 18_000)])
def test_strip_has_no_face(detector, size) -> None:
    strip = IMAGES / "strip.png" if size is None else Image.new("RGB", size)
    extractor = ClipExtractor(PhotoFaceDetection(detector), None)
    with pytest.raises(FaceError, match="no face detected"):
        ReferenceFaces.detect(extractor, strip)


UNUSABLE_LANDMARKS = {
    "equal": torch.full((5, 2), 50.0),
    "nan": torch.full((5, 2), float("nan")),
    "one nan": torch.tensor(TEMPLATE).index_fill(0, torch.tensor([3]), float("nan")),
    "infinite": torch.full((5, 2), float("inf")),
}


@pytest.mark.parametrize("name", UNUSABLE_LANDMARKS)
def test_face_without_usable_landmarks_is_refused(name: str, tmp_path: Path) -> None:
    landmarks = UNUSABLE_LANDMARKS[name]
    face = Face(torch.zeros(3, 100, 100), torch.tensor([0.0, 0, 100, 100]), landmarks, 0.9)
    with pytest.raises(FaceError, match="landmarks are at one point or not finite"):
        align_photo(face)
    recognition = ArcFaceRecognition.load(recognition_file(tmp_path / "r.onnx"))
    with pytest.raises(FaceError, match="landmarks"):
        recognition(face)


def test_faces_of_the_id_loss_have_usable_landmarks() -> None:
    """A face that cannot be aligned counts as none; the next one is taken."""
    image = torch.rand(3, 112, 112, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([0.0, 0, 112, 112])
    usable = Face(image, box, ARCFACE_TEMPLATE, 0.9)
    unusable = [Face(image, box, points, 0.9) for points in UNUSABLE_LANDMARKS.values()]

    class Detector:
        def __init__(self, faces: list[Face]) -> None:
            self.faces = faces

        def detect_upright(self, image: Tensor) -> list[Face]:
            return self.faces

    recognition = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 112 * 112, 4))
    none = build_face_embedder(Detector(unusable), recognition)(image[None])
    assert not none.has_face.any() and not none.embeddings.any()
    one = build_face_embedder(Detector([*unusable, usable]), recognition)(image[None])
    assert one.has_face.all() and one.embeddings.isfinite().all() and one.embeddings.any()


def test_provider_of_device() -> None:
    available = ["CUDAExecutionProvider", "CoreMLExecutionProvider", "CPUExecutionProvider"]
    assert (
        select_providers("cuda", ["MIGraphXExecutionProvider", "CPUExecutionProvider"])[0]
        == "MIGraphXExecutionProvider"
    )  # AMD
    assert select_providers("cpu", available) == ["CPUExecutionProvider"]
    assert select_providers(torch.device("mps"), available) == [
        "CoreMLExecutionProvider",
        "CPUExecutionProvider",
    ]
    assert select_providers("mps", ["CPUExecutionProvider"]) == ["CPUExecutionProvider"]
    assert select_providers("cuda:1", ["CUDAExecutionProvider"])[0] == (
        "CUDAExecutionProvider",
        {"device_id": 1},
    )
