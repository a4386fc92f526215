"""Tests of the metric models for photos against the libraries that define them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lpips
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.models import alexnet
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from openpulid.bench import metrics
from openpulid.bench import scorers as photo_scorers
from openpulid.bench.scorers import PhotoFaces, PhotoScorers
from openpulid.bench.suite import Suite, load_suite
from openpulid.errors import OptionError, WeightsError
from openpulid.faces.align import similarity_transform, warp_images
from openpulid.faces.arcface import ARCFACE_TEMPLATE
from openpulid.faces.scrfd import SCRFDDetector
from openpulid.faces.sface import SFaceRecognition
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS, download
from tests.support.photo_networks import YUNET, needs_yunet, recognition_file

DETECTOR = Path(__file__).parents[2].parent / "shared" / "faces" / "scrfd_2.5g_kps.onnx"
PHOTOS = DETECTOR.parents[1] / "photos"
needs_photos = pytest.mark.skipif(
    not DETECTOR.is_file(), reason="../shared/faces and ../shared/photos do not exist"
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """(3, 3, 256, 256): two photos of people and a gray image."""
    photos = [
        Image.open(PHOTOS / name).convert("RGB").resize((256, 256))
        for name in ("hinton.jpeg", "lecun.jpg")
    ]
    people = (
        torch.from_numpy(np.stack([np.asarray(image) for image in photos]))
        .permute(0, 3, 1, 2)
        .float()
        / 255
    )
    return torch.cat([people, torch.full((1, 3, 256, 256), 0.5)])


def build_recognition() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3 * 14 * 14, 16))


@needs_photos
def test_faces_of_photos_are_detected_and_embedded(images: torch.Tensor) -> None:
    faces = PhotoFaces(SCRFDDetector.load(DETECTOR), build_recognition())(images)
    assert faces.has_face.tolist() == [True, True, False]
    assert faces.embeddings.shape == (3, 16) and faces.embeddings[2].abs().sum() == 0
    assert 0.05 < faces.masks[0].mean() < 0.9 and faces.masks[2].sum() == 0
    assert PhotoFaces(SCRFDDetector.load(DETECTOR), build_recognition())(
        images[2:]
    ).embeddings.shape == (1, 16)
    scorers = PhotoScorers(PhotoFaces(SCRFDDetector.load(DETECTOR), build_recognition()))
    same = metrics.MetricInputs(
        images,
        images,
        faces,
        faces,
        torch.tensor([0, 1, 1]),
        images[:2],
        faces.select(torch.tensor([0, 1])),
        ["a"] * 3,
    )
    values = {metric.name: metric(same) for metric in scorers.metrics()}
    assert (
        values["face_sim"][:2].tolist() == pytest.approx([1, 1])
        and values["outside_face"].abs().max() == 0
    )


@needs_yunet
def test_sface_scores_photos(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small network that has SFace's signature, and YuNet's real file."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    file = recognition_file(tmp_path / WEIGHTS["scorer-sface"].file, dim=128)
    (tmp_path / WEIGHTS["yunet"].file).symlink_to(YUNET)
    scorers = PhotoScorers.load(CPU, lambda message: None, "sface")
    faces = scorers.faces(images)
    assert faces.has_face.tolist() == [True, True, False]
    assert faces.embeddings.shape == (3, 128) and faces.embeddings[2].abs().sum() == 0
    # the same network in onnxruntime; OpenCV rounds the crop to 8 bits
    session = onnxruntime.InferenceSession(file)
    (face,) = scorers.faces.detector.detect_upright(images[0])
    matrix = similarity_transform(face.landmarks[None], ARCFACE_TEMPLATE + 0.5)
    crop = 255 * warp_images(images[:1], matrix, 112)
    (expected,) = session.run(None, {"input.1": crop.numpy()})
    expected = torch.from_numpy(expected[0])
    assert (faces.embeddings[0] - expected).norm() < 1e-3 * expected.norm()
    with pytest.raises(WeightsError, match="`pulid weights get scorer-sface` downloads it"):
        SFaceRecognition.load(tmp_path / "none.onnx")
    file.write_bytes(b"no network")
    with pytest.raises(WeightsError, match="cannot be opened"):
        SFaceRecognition.load(file)


def test_similarities_of_another_model_are_not_compared_with_published_ones() -> None:
    suite = load_suite("pulid-paper")
    changed = suite.with_recognition("sface")
    assert changed.recognition == "sface" and suite.with_recognition("curricularface") is suite
    for source, methods in suite.published.items():
        for method, values in methods.items():
            expected = {name: value for name, value in values.items() if name != "face_sim"}
            assert changed.published[source][method] == expected
    assert "face_sim" in json.dumps(suite.published)
    assert Suite.from_json(changed.to_json()) == changed
    with pytest.raises(OptionError, match="choose from curricularface, sface"):
        suite.with_recognition("adaface")
    with pytest.raises(OptionError, match="the miniature's own models"):
        load_suite("quick").with_recognition("sface")


def test_curricular_face_has_the_published_layout(tmp_path: Path) -> None:
    """facexlib's backbone, whose last norm has no weights of its own."""
    from facexlib.recognition.arcface_arch import Backbone

    torch.manual_seed(0)
    network = Backbone(num_layers=100, drop_ratio=0.4, mode="ir")
    network.output_layer[4] = nn.BatchNorm1d(512, affine=False)
    torch.save(network.state_dict(), tmp_path / "CurricularFace_Backbone.pth")
    loaded = photo_scorers.load_curricular_face(tmp_path / "CurricularFace_Backbone.pth").eval()
    crops = torch.rand(1, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(loaded(crops), network.eval()(crops)) and loaded(crops).shape == (1, 512)


def test_dino_matches_timm(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224.dino", num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "dino.pth")
    embed = photo_scorers.load_dino(tmp_path / "dino.pth", CPU)
    images = torch.rand(2, 3, 224, 224)
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        assert torch.allclose(embed(images), model((images - mean) / std), atol=1e-4)
    with pytest.raises(WeightsError, match="not DINO"):
        torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
        photo_scorers.load_dino(tmp_path / "other.pth", CPU)


def test_lpips_matches_the_library(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = alexnet(weights=None)
    torch.save(net.state_dict(), tmp_path / "alexnet.pth")
    embed = photo_scorers.load_lpips(tmp_path / "alexnet.pth", CPU)
    theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    features = list(net.features)
    for name, part in theirs.net.named_children():
        if name.startswith("slice"):
            for index, layer in part.named_children():
                layer.load_state_dict(features[int(index)].state_dict())
    a, b = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(embed(a, b), theirs(a, b, normalize=True).flatten(), atol=1e-6)
    assert embed(a, a).abs().max() < 1e-6
    with pytest.raises(WeightsError, match="AlexNet"):
        torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
        photo_scorers.load_lpips(tmp_path / "other.pth", CPU)


def test_missing_lpips_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(WeightsError, match="pip install lpips"):
        photo_scorers.load_lpips(tmp_path / "alexnet.pth", CPU)


def test_clip_matches_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    from openpulid.mini.models.tokenizer import build_tokenizer

    words = build_tokenizer()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 32,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 256,
    }
    text |= {
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 16}, projection_dim=8)
    ).eval()
    model.save_pretrained(tmp_path)
    assert isinstance(words, PreTrainedTokenizerFast)
    words.save_pretrained(tmp_path)
    images, texts = photo_scorers.load_clip(tmp_path, CPU)
    shown, prompts = torch.rand(2, 3, 32, 32), ["portrait", "a person"]
    mean, std = (torch.tensor(x)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    with torch.no_grad():
        tokens = words(prompts, padding=True, return_tensors="pt")
        both = model(
            pixel_values=(shown - mean) / std,
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
        )
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(images(shown), both.image_embeds).min() > 0.9999
    assert cosine(texts(prompts), both.text_embeds).min() > 0.9999


@needs_photos
def test_missing_models_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError, match="pulid weights get detector"):
        PhotoScorers.load(CPU)
    with pytest.raises(WeightsError, match="cannot be downloaded automatically"):
        download("scorer-recognition")
    (tmp_path / "scrfd_10g_bnkps.onnx").symlink_to(DETECTOR)
    network = photo_scorers.__dict__["load_curricular_face"]
    monkeypatch.setattr(photo_scorers, "load_curricular_face", lambda file: build_recognition())
    (tmp_path / "CurricularFace_Backbone.pth").touch()
    messages: list[str] = []
    scorers = PhotoScorers.load(CPU, messages.append)
    assert (
        len(messages) == 4
        and "not measured: FID" in messages[-1]
        and "pulid weights get scorer-clip" in messages[0]
    )
    assert {metric.name for metric in scorers.metrics()} == {
        "face_sim",
        "sim_gt",
        "rank1",
        "copy_paste",
        "outside_face",
        "face_found",
    }
    assert scorers.method_metrics() == [] and scorers.attribute_classes({"pose": "left"}) == {}
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="CurricularFace"):
        network(tmp_path / "other.pth")
