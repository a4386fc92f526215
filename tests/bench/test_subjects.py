"""Tests of subjects from photos."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from openpulid.bench.score import MAX_SIDE, load_portraits
from openpulid.bench.subjects import load_photo_subjects
from openpulid.errors import OptionError


def save_photo(path: Path, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def test_subject_names_are_unique(tmp_path: Path) -> None:
    save_photo(tmp_path / "Dr. Jones" / "1.png")
    save_photo(tmp_path / "Dr. Smith" / "1.png")
    save_photo(tmp_path / "Dr. Smith" / "2.png")
    save_photo(tmp_path / "anna.jpg")
    subjects = load_photo_subjects(tmp_path)
    assert [(subject.name, subject.other is not None) for subject in subjects] == [
        ("Dr. Jones", False), ("Dr. Smith", True), ("anna", False)
    ]  # fmt: skip
    # a run directory uses this name for the second image of Dr. Smith
    save_photo(tmp_path / "Dr. Smith-other.png")
    with pytest.raises(OptionError, match=r"called Dr\. Smith-other;"):
        load_photo_subjects(tmp_path)
    save_photo(tmp_path / "anna.png")
    with pytest.raises(OptionError, match=r"Dr\. Smith-other, anna, anna-other;"):
        load_photo_subjects(tmp_path)
    with pytest.raises(OptionError, match="not a folder"):
        load_photo_subjects(tmp_path / "nowhere")


def test_portraits_of_different_sizes_are_not_distorted(tmp_path: Path) -> None:
    save_photo(tmp_path / "wide.png", (60, 20))
    save_photo(tmp_path / "tall.png", (20, 40))
    wide, tall = load_portraits([tmp_path / "wide.png", tmp_path / "tall.png"])
    assert wide.shape == tall.shape == (3, 60, 60)
    sizes = []
    for image in (wide, tall):
        red_pixels = (image[1] < 0.5).nonzero()
        sizes.append((red_pixels.amax(0) - red_pixels.amin(0) + 1).tolist())
    assert sizes == [[20, 60], [60, 30]]  # height and width: 1 to 3, and 2 to 1
    save_photo(tmp_path / "large.png", (2 * MAX_SIDE, MAX_SIDE))
    assert load_portraits([tmp_path / "large.png"]).shape == (1, 3, MAX_SIDE, MAX_SIDE)
    assert load_portraits([tmp_path / "tall.png"]).shape == (1, 3, 40, 20)
