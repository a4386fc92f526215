"""The miniature's extractor: features of the face alone, with gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from openpulid.errors import FaceError
from openpulid.faces.align import TEMPLATE
from openpulid.faces.face import Face
from openpulid.faces.miniature import MiniFaceDetector, ResNetRecognition
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.extractor import MiniExtractor
from openpulid.identity.identity import concat_identities
from openpulid.io.checkpoints import save_module


@pytest.fixture(scope="module")
def networks() -> Sequence[torch.nn.Module]:
    torch.manual_seed(0)
    tower = VisionEncoder(
        img_size=32, patch_size=8, embed_dim=24, depth=5, num_heads=3, num_classes=10, ref_grid=None
    )
    return (
        MiniFaceDetector((8, 8, 8)).eval(),
        ResNetRecognition(8, (8, 8, 8), (1, 1, 1), dim=12).eval(),
        tower.eval(),
    )


@pytest.fixture(scope="module")
def extractor(networks) -> MiniExtractor:
    return MiniExtractor(*networks, models={"recognition": "a", "vision": "b"})


def face(image: torch.Tensor) -> Face:
    height, width = image.shape[-2:]
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : -height // 4, width // 4 : -width // 4] = 1
    box = torch.tensor([width / 4, height / 4, 3 * width / 4, 3 * height / 4])
    return Face(image, box, TEMPLATE * torch.tensor([width, height]), 0.9, mask)


def test_one_image_and_several(extractor) -> None:
    generator = torch.Generator().manual_seed(0)
    faces = [
        face(torch.rand(3, 96, 96, generator=generator)),
        face(torch.rand(3, 60, 60, generator=generator)),
    ]
    anna = concat_identities(extractor.extract(faces))
    assert (
        anna.id_cond.shape == (1, 2, 12 + 10)
        and [x.shape for x in anna.hidden] == [(1, 2 * 17, 24)] * 5
    )
    assert anna.models == {"recognition": "a", "vision": "b"} and not anna.id_cond.requires_grad
    alone = extractor.extract(faces[1:])[0]
    torch.testing.assert_close(alone.id_cond[:, 0], anna.id_cond[:, 1])
    torch.testing.assert_close(alone.hidden[0], anna.hidden[0][:, 17:])


def test_only_the_face_determines_the_features(extractor) -> None:
    generator = torch.Generator().manual_seed(0)
    one = face(torch.rand(3, 96, 96, generator=generator))
    other = torch.where(one.mask.bool(), one.image, torch.rand(3, 96, 96, generator=generator))
    first, second = extractor.extract([one])[0], extractor.extract([face(other)])[0]
    torch.testing.assert_close(first.id_cond, second.id_cond)
    inside = extractor.extract([face(one.image.flip(0))])[0]
    assert not torch.allclose(first.id_cond, inside.id_cond, atol=1e-3)


def test_batches_are_differentiable(extractor) -> None:
    faces = [
        face(torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(k))) for k in range(3)
    ]
    images = torch.stack([f.image for f in faces]).requires_grad_()
    masks, landmarks = (
        torch.stack([f.mask for f in faces]),
        torch.stack([f.landmarks for f in faces]),
    )
    id_cond, hidden = extractor.extract_batch(images, masks, landmarks)
    torch.testing.assert_close(
        id_cond[1:2, None], extractor.extract(faces[1:2])[0].id_cond, atol=1e-5, rtol=1e-4
    )
    assert [x.shape for x in hidden] == [(3, 17, 24)] * 5
    id_cond.sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("value", [50.0, float("nan")])
def test_face_without_usable_landmarks_is_refused(extractor, value: float) -> None:
    unusable = replace(face(torch.rand(3, 96, 96)), landmarks=torch.full((5, 2), value))
    with pytest.raises(FaceError, match="landmarks"):
        extractor.extract([unusable])
    with pytest.raises(FaceError, match="landmarks"):
        extractor.debug_crops(unusable)


def test_no_face_is_an_empty_list(extractor) -> None:
    with torch.no_grad():
        extractor.detector.score[-1].bias.fill_(-100)
    assert extractor.detection.detect(torch.rand(3, 30, 40)) == []
    assert "96" in extractor.detection.search_description


def test_loaded_from_files(networks, tmp_path) -> None:
    paths = [
        save_module(net, tmp_path / f"{name}.safetensors")
        for net, name in zip(networks, "frv", strict=True)
    ]
    loaded = MiniExtractor.load(*paths)
    assert set(loaded.models) == {"r", "v"} and all(len(x) == 64 for x in loaded.models.values())
    assert loaded.device == torch.device("cpu")
    one = face(torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0)))
    expected = MiniExtractor(*networks).extract([one])[0]
    torch.testing.assert_close(loaded.extract([one])[0].id_cond, expected.id_cond)
