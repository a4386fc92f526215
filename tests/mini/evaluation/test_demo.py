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
from openpulid.errors import OptionError
from openpulid.mini.evaluation import demo
from openpulid.world import VOCABULARY, Scene


def embed_center(images: Tensor) -> Faces:
    """Take the center of an image as the face, and its color as the embedding."""
    masks = torch.zeros(len(images), 1, *images.shape[2:])
    masks[:, :, 32:64, 32:64] = 1
    colors = images[:, :, 48, 48]
    return Faces(torch.ones(len(images), dtype=torch.bool), colors, masks)


def embed_no_face(images: Tensor) -> Faces:
    """Find a face in the reference images alone, of which there are more than two."""
    faces = embed_center(images)
    if len(images) > 2:
        return faces
    return Faces(faces.has_face & False, 0 * faces.embeddings, faces.masks)


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
    assert figures["without_identity"] == 0
    # One channel of one image changes.
    assert figures["changed_outside_face"] == pytest.approx(0.2 / 3 / 2, abs=1e-4)


def test_images_are_matched_to_the_most_similar_reference() -> None:
    red, green, blue = (flat(color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    references = [red, green, blue]
    assert demo.match_references(embed_center, references, [[red, green], [green, green]]) == 0.75
    # an image without a face matches nobody, not the first person
    assert demo.match_references(embed_no_face, references, [[red, green]]) == 0
    # a reference beyond the first eight is not among the choices
    far = [red] + [blue] * 7 + [green]
    assert demo.match_references(embed_center, far, [[red, flat((90, 100, 0))]]) == 1.0


def test_demo_prompts_describe_their_scenes() -> None:
    for prompt, scene in demo.SHOTS.items():
        visible = scene.attributes()
        assert visible["style"] in prompt or (scene.style == "noir" and "film noir" in prompt)
        for name in ("background", "clothing", "hair_color", "hat_color"):
            if name in visible and visible[name] != getattr(Scene(), name):
                assert visible[name] in prompt, (prompt, name)


def test_demo_prompts_use_vocabulary() -> None:
    for prompt in demo.SHOTS:
        words = prompt.replace(",", " , ").split()
        assert set(words) <= set(VOCABULARY), prompt


class Studio:
    """Generates the reference image of the identity, or a gray image."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, bool]] = []

    def identify(self, images: list[Image.Image]) -> Image.Image:
        return images[0]

    def generate(
        self, prompt: str, identity: Image.Image | None = None, seed: int = 0
    ) -> SimpleNamespace:
        self.calls.append((prompt, seed, identity is not None))
        return SimpleNamespace(images=[identity or flat((90, 90, 90))])


def test_demo_of_another_preset_is_one_sentence(tmp_path: Path) -> None:
    sentence = "the synthetic people need the miniature, not sdxl: choose mini, mini-lightning, "
    with pytest.raises(OptionError, match=sentence + "mini-flux, mini-flux-4step"):
        demo.run(tmp_path, preset="sdxl")
    with pytest.raises(OptionError, match="mini-flx"):
        demo.run(tmp_path, preset="mini-flx")


def test_demo_writes_sheets_page_and_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    studio = Studio()
    monkeypatch.setattr(demo, "load", lambda preset, device: studio)
    messages: list[str] = []
    result = demo.run(tmp_path, people_seed=3, log=messages.append)
    # every prompt once without identity and once with each, always with the same seed
    assert len(studio.calls) == 4 * len(demo.SHOTS)
    assert len({(prompt, seed) for prompt, seed, _ in studio.calls}) == len(demo.SHOTS)
    assert sum(not has_identity for *_, has_identity in studio.calls) == len(demo.SHOTS)
    width, height = Image.open(result.image).size
    assert width > 9 * demo.SIDE and height > 2 * demo.SIDE
    assert Image.open(result.people).size[1] > 4 * demo.SIDE
    page = result.page.read_text("utf-8")
    assert page.count("data:image/png;base64,") == 1 + 2 * 8 + 8 + 3 * 9
    assert "http" not in page  # the page loads nothing
    scores = json.loads((tmp_path / "demo.json").read_text())
    assert scores | {"seconds": result.figures["seconds"]} == result.figures
    # the "generated" images are the reference images themselves
    assert result.figures["same_person"] == pytest.approx(1, abs=1e-3)
    assert result.figures["without_identity"] == 0  # a gray image has no face
    assert result.figures["matched_of_8"] == 1
    assert 0.4 < result.figures["perfect"] < 0.9 and result.figures["other_person"] < 0.2
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
        "people.png",
    ]
