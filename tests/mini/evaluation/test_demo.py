"""The demo's scores and files, with a studio and a face scorer that are computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor

from openpulid.bench.metrics import Faces
from openpulid.mini.evaluation import demo
from openpulid.world import VOCABULARY


def embed_center(images: Tensor) -> Faces:
    """Take the center of an image as the face, and its color as the embedding."""
    masks = torch.zeros(len(images), 1, *images.shape[2:])
    masks[:, :, 32:64, 32:64] = 1
    colors = images[:, :, 48, 48]
    return Faces(torch.ones(len(images), dtype=torch.bool), colors, masks)


def flat(color: tuple[int, int, int], face: tuple[int, int, int] | None = None) -> Image.Image:
    image = Image.new("RGB", (96, 96), color)
    image.paste(face or color, (32, 32, 64, 64))
    return image


def test_scores_match_manual_computation() -> None:
    portraits = [flat((255, 0, 0)), flat((0, 255, 0)), flat((0, 0, 255))]
    without = [flat((51, 51, 51), (0, 0, 255)), flat((51, 51, 51), (0, 0, 255))]
    with_identity = [flat((51, 51, 51), (255, 0, 0)), flat((102, 51, 51), (0, 255, 0))]
    figures = demo.score_images(embed_center, portraits, without, with_identity)
    assert figures["same_person"] == 0.5  # one of two images shows the person
    assert figures["other_person"] == 0.25  # one pair of two people and two images
    # One channel of one image changes.
    assert figures["changed_outside_face"] == pytest.approx(0.2 / 3 / 2, abs=1e-4)


def test_demo_prompts_use_vocabulary() -> None:
    for prompt in demo.PROMPTS:
        words = prompt.replace(",", " , ").split()
        assert set(words) <= set(VOCABULARY), prompt


class Studio:
    def __init__(self) -> None:
        self.seeds: list[tuple[int, bool]] = []

    def identify(self, images: list[Image.Image]) -> str:
        return "identity"

    def generate(self, prompt: str, identity: object = None, seed: int = 0) -> SimpleNamespace:
        self.seeds.append((seed, identity is not None))
        return SimpleNamespace(images=[flat((200, 100, 50))])


def test_demo_writes_image_page_and_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    studio = Studio()
    monkeypatch.setattr(demo, "load", lambda preset, device: studio)
    monkeypatch.setattr(demo.FaceScorer, "load", lambda: embed_center)
    messages: list[str] = []
    result = demo.run(tmp_path, people_seed=3, log=messages.append)
    # Every prompt is generated twice with the same seed.
    assert len(studio.seeds) == 2 * len(demo.PROMPTS)
    assert {seed for seed, has_identity in studio.seeds if has_identity} == {
        seed for seed, has_identity in studio.seeds if not has_identity
    }
    width, height = Image.open(result.image).size
    assert height > width > 3 * 280
    page = result.page.read_text("utf-8")
    assert page.count("data:image/png;base64,") == 3 * len(demo.PROMPTS)
    assert "http" not in page  # the page loads nothing
    scores = json.loads((tmp_path / "demo.json").read_text())
    assert scores | {"seconds": result.figures["seconds"]} == result.figures
    assert set(result.figures) == {
        "same_person",
        "other_person",
        "changed_outside_face",
        "seconds",
    }
    assert "1000003" in messages[0]
    # again in the same folder, beside a page of the user's own
    result.page.write_text("my page")
    again = demo.run(tmp_path, people_seed=3)
    assert again.image == result.image and again.page == tmp_path / "index-2.html"
    assert result.page.read_text() == "my page"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "demo.json",
        "demo.png",
        "index-2.html",
        "index.html",
    ]
