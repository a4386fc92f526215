"""Cached face features equal those that the identity encoder gets at inference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openpulid.faces.miniature import MiniFaceDetector, ResNetRecognition
from openpulid.identity.extractor import MiniExtractor
from openpulid.mini.data import load_faces
from openpulid.mini.data.features import FaceFeatures
from openpulid.mini.train.vision_encoder import build_vision_encoder


@pytest.fixture
def extractor() -> MiniExtractor:
    torch.manual_seed(0)
    recogniser = ResNetRecognition(8, (8, 8, 8), (1, 1, 1), dim=6)
    return MiniExtractor(
        MiniFaceDetector((4, 8, 8)).eval(),
        recogniser.eval(),
        build_vision_encoder(width=32, depth=6).eval(),
    )


def test_cached_rows_equal_extracted_features(small_world, extractor, tmp_path) -> None:
    steps = []
    features = FaceFeatures.build(
        extractor, small_world, tmp_path, lambda done, total: steps.append((done, total))
    )
    assert steps[-1] == (len(small_world), len(small_world))
    rows = np.array([5, 0])
    id_cond, hidden = features.rows(rows)
    with torch.no_grad():
        expected, levels = extractor.extract_batch(
            *load_faces(small_world, rows, torch.device("cpu"))
        )
    assert torch.allclose(id_cond, expected, atol=1e-5)
    assert len(hidden) == 5 and all(
        torch.allclose(a, b, atol=1e-2) for a, b in zip(hidden, levels, strict=True)
    )


def test_changed_network_or_data_invalidates_cache(
    small_world, extractor, tmp_path, monkeypatch
) -> None:
    def count_batches() -> int:
        steps: list[int] = []
        FaceFeatures.build(extractor, small_world, tmp_path, lambda done, total: steps.append(done))
        return len(steps)

    assert count_batches() == 1 and count_batches() == 0
    with torch.no_grad():
        next(extractor.recognition.parameters()).add_(1.0)
    assert count_batches() == 1
    monkeypatch.setattr(small_world, "key", {"plan": "another"})
    assert count_batches() == 1 and count_batches() == 0
    (tmp_path / "cache.json").write_text("")  # as after a crash while it was written
    assert count_batches() == 1
