"""People from photographs: their names, and how the judges see pictures of different sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from openpulid.bench.score import LARGEST, fitted
from openpulid.bench.subjects import photo_subjects
from openpulid.errors import OptionError


def photo(file: Path, size: tuple[int, int] = (32, 32)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(file)


def test_everybody_has_a_name_of_their_own(tmp_path: Path) -> None:
    photo(tmp_path / "Dr. Jones" / "1.png")
    photo(tmp_path / "Dr. Smith" / "1.png")
    photo(tmp_path / "Dr. Smith" / "2.png")
    photo(tmp_path / "anna.jpg")
    found = photo_subjects(tmp_path)
    assert [(sitter.name, sitter.other is not None) for sitter in found] == [
        ("Dr. Jones", False), ("Dr. Smith", True), ("anna", False)
    ]  # fmt: skip
    photo(
        tmp_path / "Dr. Smith-other.png"
    )  # that is what the second picture of Dr. Smith is called in a run
    with pytest.raises(OptionError, match=r"called Dr\. Smith-other;"):
        photo_subjects(tmp_path)
    photo(tmp_path / "anna.png")
    with pytest.raises(OptionError, match=r"Dr\. Smith-other, anna, anna-other;"):
        photo_subjects(tmp_path)
    with pytest.raises(OptionError, match="no folder"):
        photo_subjects(tmp_path / "nowhere")


def test_pictures_of_other_sizes_are_not_distorted(tmp_path: Path) -> None:
    photo(tmp_path / "wide.png", (60, 20))
    photo(tmp_path / "tall.png", (20, 40))
    wide, tall = fitted([tmp_path / "wide.png", tmp_path / "tall.png"])
    assert wide.shape == tall.shape == (3, 60, 60)
    red = [
        (picture[1] < 0.5).nonzero().amax(0) - (picture[1] < 0.5).nonzero().amin(0) + 1
        for picture in (wide, tall)
    ]
    assert red[0].tolist() == [20, 60] and red[1].tolist() == [
        60,
        30,
    ]  # height and width: 3 to 1, and 1 to 2
    photo(tmp_path / "large.png", (2 * LARGEST, LARGEST))
    assert fitted([tmp_path / "large.png"]).shape == (1, 3, LARGEST, LARGEST)
    assert fitted([tmp_path / "tall.png"]).shape == (1, 3, 40, 20)
