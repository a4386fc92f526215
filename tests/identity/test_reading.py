"""Photos before and after face detection: size, precision, color, models of an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from facexlib.parsing.bisenet import BiSeNet
from PIL import Image

from openpulid.errors import FaceError, IdentityError, OptionError
from openpulid.faces.arcface import ArcFaceRecognition
from openpulid.faces.bisenet import TEMPLATE, FaceParser, MainHead, align_photo
from openpulid.faces.face import Face
from openpulid.faces.miniature import MiniFaceDetector
from openpulid.faces.photo_detector import LONGEST
from openpulid.faces.scrfd import SCRFDDetector
from openpulid.identity.clip_extractor import ClipExtractor
from openpulid.identity.detection import MiniFaceDetection
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.identity import Identity
from openpulid.identity.photo_extractor import PhotoExtractor
from openpulid.identity.reference import ReferenceFaces
from openpulid.io.checkpoints import fingerprint
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines.factory import defer_extractor, load_extractor
from openpulid.pipelines.presets import sdxl
from tests.support.photo_networks import recognition_file

MODELS = {"glintr100": "a", "EVA02": "b"}


def tower() -> VisionEncoder:
    torch.manual_seed(0)
    return VisionEncoder(
        img_size=32, patch_size=8, embed_dim=32, depth=5, num_heads=2, num_classes=12, ref_grid=None
    ).eval()


@pytest.fixture
def finder() -> MiniFaceDetector:
    """Build a detector that detects a face in every image."""
    network = MiniFaceDetector((8, 8, 8)).eval().requires_grad_(False)
    network.score[-1].weight.zero_(), network.score[-1].bias.fill_(100)
    network.parts.weight.zero_(), network.parts.bias.zero_()
    network.parts.bias[4:8] = 100
    return network


def detection(finder: MiniFaceDetector, longest: int) -> MiniFaceDetection:
    """Build a face detection that reduces images as for photos."""
    face_detection = MiniFaceDetection(finder)
    face_detection.max_image_size = longest
    return face_detection


def test_large_photos_are_reduced_before_detection(finder) -> None:
    photos = ClipExtractor(detection(finder, longest=LONGEST), None)
    miniature = ClipExtractor(MiniFaceDetection(finder), None)
    large = Image.new("RGB", (1200, 1600))
    for extractor, shape in ((photos, (3, 1024, 768)), (miniature, (3, 1600, 1200))):
        reference = ReferenceFaces.detect(extractor, large)
        assert reference.images[0].faces[0].image.shape == shape
        assert reference.describe() == ["image: face 0 at 0,0 to 1200,1600, score 1.00"]
    small = np.random.default_rng(0).integers(0, 256, (600, 1024, 3), dtype=np.uint8)
    face = ReferenceFaces.detect(photos, Image.fromarray(small)).images[0].faces[0]
    assert torch.equal((face.image * 255).round().byte(), torch.from_numpy(small).permute(2, 0, 1))


def test_message_reports_the_original_size(finder) -> None:
    finder.score[-1].bias.fill_(-100)
    extractor = ClipExtractor(detection(finder, longest=LONGEST), None)
    with pytest.raises(FaceError, match="no face detected in its 1200 x 1600 pixels"):
        ReferenceFaces.detect(extractor, Image.new("RGB", (1200, 1600)))


@torch.no_grad()
def test_strip_needs_no_square_of_its_length(finder) -> None:
    """The detector pads to squares: 16 x 60,000 pixels would need 43 GB."""
    extractor = ClipExtractor(MiniFaceDetection(finder), None)
    with pytest.raises(FaceError, match="no face detected in its 16 x 60000 pixels"):
        ReferenceFaces.detect(extractor, Image.new("RGB", (16, 60_000)))


def test_message_about_no_face_is_true_for_several_people(finder) -> None:
    finder.score[-1].bias.fill_(-100)
    with pytest.raises(FaceError, match="only detects synthetic people"):
        ReferenceFaces.detect(
            ClipExtractor(MiniFaceDetection(finder), None), Image.new("RGB", (96, 96))
        )


def test_bfloat16_vision_encoder_runs_on_any_cpu(tmp_path: Path) -> None:
    image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255
    face = Face(
        image,
        torch.tensor([0.0, 0, 1, 1]),
        torch.tensor(TEMPLATE) - torch.tensor([30.0, 200.0]),
        1.0,
    )
    whole = tower()
    expected, levels = whole(whole.prepare(align_photo(face)))
    recogniser = ArcFaceRecognition.load(recognition_file(tmp_path / "glintr100.onnx", dim=12))
    parser = FaceParser(MainHead(BiSeNet(num_class=19)))
    features = PhotoExtractor(
        None, recogniser, parser, whole.to(torch.bfloat16), MODELS, use_gray=False
    )
    (identity,) = features.extract([face])
    assert identity.id_cond.shape == (1, 1, 12 + 12) and identity.models == features.models
    for ours, theirs in zip(
        (identity.id_cond[0, :, 12:], *identity.hidden), (expected, *levels), strict=True
    ):
        assert ours.dtype == torch.float32 and (ours - theirs).norm() < 0.1 * theirs.norm()


@torch.no_grad()
def test_all_models_receive_the_selected_face(tmp_path: Path) -> None:
    """Of two faces in one picture, recogniser and tower see the same one."""
    image = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1).float() / 255
    shifts = torch.tensor([[30.0, 200.0], [-150.0, -80.0]])
    two = [
        Face(image, torch.tensor([0.0, 0, 1, 1]), torch.tensor(TEMPLATE) * 0.5 - shift * 0.5, 1.0)
        for shift in shifts
    ]
    recogniser = ArcFaceRecognition.load(recognition_file(tmp_path / "glintr100.onnx", dim=12))
    whole = tower()
    features = PhotoExtractor(
        None, recogniser, FaceParser(MainHead(BiSeNet(num_class=19))), whole, MODELS, use_gray=False
    )
    for face, identity in zip(two, features.extract(two), strict=True):
        seen, levels = whole(whole.prepare(align_photo(face)))
        torch.testing.assert_close(identity.id_cond[0], torch.cat([recogniser(face), seen], dim=1))
        torch.testing.assert_close(list(identity.hidden), list(levels))
    one, other = (identity.id_cond[0] for identity in features.extract(two))
    assert (one - other)[:, :12].abs().max() > 0.01 and (one - other)[:, 12:].abs().max() > 1e-4


def test_adapter_requires_the_face_models_of_its_training(
    tmp_path: Path, tiny_pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of a training remembers that; a published one does not say."""
    recognition_file(tmp_path / "glintr100.onnx")
    (tmp_path / "EVA02.pt").write_bytes(b"a tower")
    torch.save(BiSeNet(num_class=19).state_dict(), tmp_path / "parsing.pth")
    monkeypatch.setattr(SCRFDDetector, "load", lambda file, device: None)
    monkeypatch.setattr(VisionEncoder, "from_published", lambda file, dtype: tower())
    names = {
        "detector": "scrfd.onnx",
        "recognition": "glintr100.onnx",
        "face_parsing": "parsing.pth",
        "vision_encoder": "EVA02.pt",
    }
    preset = sdxl().with_models(**{role: tmp_path / name for role, name in names.items()})
    made = PuLID.for_unet(tiny_pipeline().unet, IDEncoder(24, 64, vit_dim=32, hidden_dim=16))
    read = {
        name: fingerprint(tmp_path / file)
        for name, file in (("glintr100", "glintr100.onnx"), ("EVA02", "EVA02.pt"))
    }
    for known in ({}, read):
        adapter = PuLID.load(
            made.save(tmp_path / "adapter.safetensors", {"models": json.dumps(known)})
        )
        assert load_extractor(preset, torch.device("cpu"), adapter).models == read
        assert defer_extractor(preset, torch.device("cpu"), adapter).models == read
    adapter = PuLID.load(
        made.save(tmp_path / "adapter.safetensors", {"models": json.dumps({**read, "EVA02": "0"})})
    )
    for function in (load_extractor, defer_extractor):
        with pytest.raises(
            OptionError, match="but the current EVA02 differs; pass the insightface pack"
        ):
            function(preset, torch.device("cpu"), adapter)


def test_color_and_gray_features_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recognition_file(tmp_path / "glintr100.onnx")
    (tmp_path / "EVA02.pt").write_bytes(b"a tower")
    torch.save(BiSeNet(num_class=19).state_dict(), tmp_path / "parsing.pth")
    monkeypatch.setattr(SCRFDDetector, "load", lambda file, device: None)  # not here
    monkeypatch.setattr(
        VisionEncoder, "from_published", lambda file, dtype: tower()
    )  # the published one has 300 million numbers
    files = [
        tmp_path / name for name in ("detector.onnx", "glintr100.onnx", "parsing.pth", "EVA02.pt")
    ]
    gray, colour = PhotoExtractor.load(*files), PhotoExtractor.load(*files, use_gray=False)
    assert gray.use_gray and not colour.use_gray
    assert set(gray.models) == {
        "glintr100",
        "EVA02",
    }  # identities that were made before go on to fit
    one, other = (
        Identity(torch.zeros(1, 1, 24), (), features.models) for features in (gray, colour)
    )
    for identity, features in ((one, colour), (other, gray)):
        with pytest.raises(IdentityError, match=r"other models \(use_gray\)"):
            identity.require(features.models)
    other.require(colour.models)
