"""Examples of dropped images."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from openpulid.data.examples import list_examples, write_examples
from openpulid.data.records import ImageRecord
from openpulid.data.sources import find_sources
from openpulid.io import images


def test_examples_are_decoded_in_child_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (400, 300), "red").save(photos / "a.png")
    (photos / "b.png").write_bytes(b"no image")
    sources = {image.key: image for image in find_sources([photos])}
    records = [ImageRecord(image.name, image.key, decision="no_face") for image in sources.values()]

    def crash(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGABRT)

    monkeypatch.setattr(images, "decode_file", crash)  # a decoder in this process
    write_examples(tmp_path, records, sources, seed=0)
    (example,) = list_examples(tmp_path, "no_face")
    assert Image.open(example).size == (256, 192)
