"""From a photo to an image of a tiny SDXL: detection, selection, features, generation."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from facexlib.parsing.bisenet import BiSeNet
from PIL import Image

from openpulid.errors import FaceError, OptionError
from openpulid.faces.arcface import ArcFaceRecognition
from openpulid.faces.bisenet import FaceParser, MainHead
from openpulid.faces.face import Face, select_face
from openpulid.identity.detection import PhotoFaceDetection
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines.presets import sdxl
from openpulid.pipelines.selection import resolve_preset
from openpulid.pipelines.studio import Studio
from tests.support.photo_networks import DETECTOR, GROUP, needs_detector, recognition_file

pytestmark = needs_detector


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> PhotoExtractor:
    torch.manual_seed(0)
    tower = VisionEncoder(
        img_size=32, patch_size=8, embed_dim=8, depth=5, num_heads=2, num_classes=4, ref_grid=None
    ).eval()
    recogniser = ArcFaceRecognition.load(
        recognition_file(tmp_path_factory.mktemp("faces") / "glintr100.onnx", dim=12)
    )
    parser = FaceParser(MainHead(BiSeNet(num_class=19)))
    return PhotoExtractor(
        PhotoFaceDetection.load(DETECTOR, "cpu"),
        recogniser,
        parser,
        tower,
        {"glintr100": "a", "EVA02": "b"},
    )


@pytest.fixture(scope="module")
def group() -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(GROUP))).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def studio(features, tiny_pipeline) -> Studio:
    pipe = tiny_pipeline()
    torch.manual_seed(0)
    former = IDFormer(
        dim=32,
        depth=5,
        dim_head=16,
        heads=2,
        num_queries=4,
        output_dim=64,
        ff_mult=2,
        width=16,
        vit_dim=8,
        hidden_dim=16,
    )
    adapter = PuLID.for_unet(pipe.unet, former)
    for layer in adapter.id_adapter_attn_layers.values():
        torch.nn.init.normal_(layer.id_to_v.weight)
    pipe.set_progress_bar_config(disable=True)
    preset = sdxl().with_models(use_half_precision=False)
    preset = preset.with_defaults(
        num_inference_steps=2, guidance_scale=2.0, width=16, height=16, negative_prompt=""
    )
    return Studio(pipe, adapter.eval(), features, preset)


def test_all_features_are_of_the_selected_face(features, group) -> None:
    faces = features.detection.detect(group)
    for order, index in (("large-small", None), ("left-right", 0), ("left-right", 5)):
        face = select_face(faces, index, order)
        x1, y1, x2, y2 = (int(v) for v in face.box)
        alone = torch.full_like(group, 0.5)
        around = (slice(None), slice(max(0, y1 - 120), y2 + 120), slice(max(0, x1 - 110), x2 + 110))
        alone[around] = group[around]
        whole = features.extract([face])[0]
        part = features.extract([Face(alone, face.box, face.landmarks, face.score)])[0]
        assert torch.equal(
            whole.id_cond[..., :12], part.id_cond[..., :12]
        )  # the recogniser's crop is of this face alone
    one, other = (features.extract([select_face(faces, k, "left-right")])[0] for k in (0, 5))
    for first, second in zip(
        (one.id_cond, *one.hidden), (other.id_cond, *other.hidden), strict=True
    ):
        assert not torch.allclose(first, second, atol=1e-3)


def test_vision_encoder_receives_gray_on_white(features, group) -> None:
    face = select_face(features.detection.detect(group), 0)
    crop, gray = features.debug_crops(face)
    kept = features.face_parsing(crop[None])[0, 0].bool()
    assert 0 < kept.float().mean() < 1
    assert (gray[:, ~kept] == 1).all() and torch.equal(gray[0], gray[2])
    expected = 0.299 * crop[0] + 0.587 * crop[1] + 0.114 * crop[2]
    torch.testing.assert_close(gray[0][kept], expected[kept])
    colour = PhotoExtractor(
        features.detection,
        features.recognition,
        features.face_parsing,
        features.vision_encoder,
        use_gray=False,
    )
    assert not torch.allclose(
        colour.extract([face])[0].id_cond, features.extract([face])[0].id_cond
    )


def test_large_and_small_copies_of_a_photo_agree(studio) -> None:
    photo = Image.fromarray(skimage.data.astronaut())
    large = photo.resize((3072, 3072), Image.Resampling.LANCZOS)
    small, other = (image.faces[0] for image in studio.detect([photo, large]).images)
    assert small.image.shape == (3, 512, 512) and other.image.shape == (3, 1024, 1024)
    assert (other.landmarks / 2 - small.landmarks).abs().max() < 4
    assert np.abs(np.array(other.pixel_box) / 6 - small.pixel_box).max() < 6
    one, two = (studio.extractor.recognition(face) for face in (small, other))
    assert torch.cosine_similarity(one, two) > 0.95


def test_shapes_and_models(features, group) -> None:
    identity = features.extract([select_face(features.detection.detect(group), 0)])[0]
    assert (
        identity.id_cond.shape == (1, 1, 12 + 4)
        and [x.shape for x in identity.hidden] == [(1, 17, 8)] * 5
    )
    assert identity.models == {"glintr100": "a", "EVA02": "b"}
    torch.testing.assert_close(identity.id_cond[0, 0, 12:].norm(), torch.tensor(1.0))


def test_photo_to_image(studio, caplog) -> None:
    anna = studio.identify(GROUP)
    assert "the image has 6 faces" in caplog.text
    caplog.clear()
    ben = studio.identify(GROUP, face_index=1)
    assert not caplog.text
    assert studio.identify([GROUP, GROUP], face_index=0).photos == 2
    assert studio.identify([GROUP, GROUP], face_index=0, fusion="mean").photos == 1
    images = [studio.generate("portrait", who, seed=3).images[0] for who in (None, anna, ben)]
    assert images[0].size == (16, 16) and len({image.tobytes() for image in images}) == 3


def test_all_faces_are_described_in_order(studio) -> None:
    lines = studio.detect(GROUP).describe("left-right")
    assert [line.split(" at ")[0] for line in lines] == [f"{GROUP}: face {k}" for k in range(6)]
    lefts = [int(line.split(" at ")[1].split(",")[0]) for line in lines]
    assert lefts == sorted(lefts)


def test_another_face_pack_replaces_the_face_models(tmp_path) -> None:
    (tmp_path / "a.onnx").symlink_to(DETECTOR)
    recognition_file(tmp_path / "b.onnx")
    chosen = resolve_preset(sdxl(), face_pack=tmp_path)
    assert (chosen.models.detector, chosen.models.recognition) == (
        tmp_path / "a.onnx",
        tmp_path / "b.onnx",
    )
    assert "arcface" not in chosen.published and "detector" not in chosen.published
    with pytest.raises(OptionError, match="uses its own face models; face_pack is only"):
        resolve_preset("mini", face_pack=tmp_path)


def test_missing_face_reports_what_was_tried(studio, tmp_path) -> None:
    Image.new("RGB", (300, 200), "gray").save(tmp_path / "wall.png")
    message = (
        r"wall\.png: no face detected in its 300 x 200 pixels "
        r"\(three sizes, in four orientations\)"
    )
    with pytest.raises(FaceError, match=message):
        studio.identify(tmp_path / "wall.png")
    with pytest.raises(FaceError, match=r"t1\.jpg: there is no face 6; the image has 6 faces"):
        studio.identify(GROUP, face_index=6)


def test_detected_faces_are_drawn(studio) -> None:
    sheet = studio.detect(GROUP).draw(2, "left-right")
    assert (
        sheet.height == 512 and sheet.width == round(512 * 1024 / 709) + 2 * 512
    )  # 1280 x 886, shrunk
    green = (np.abs(np.array(sheet).astype(int) - (0, 200, 83)) < 60).all(-1)  # resampled
    assert green.sum() > 100
