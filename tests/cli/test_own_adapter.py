"""`pulid generate` on a base for which no adapter is published: with one's own, and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openpulid.identity.identity import hash_models
from openpulid.io.hub import WEIGHTS, locate
from openpulid.pipelines.presets import flux2_klein
from tests.cli.conftest import Run
from tests.support.people import anna
from tests.support.tiny_bases import flux2_with_text, fresh_adapter


def test_generate_with_an_adapter_of_ones_own(
    pulid: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Face models are not opened for a saved identity, only compared by their hashes."""
    pipe = flux2_with_text()
    pipe.save_pretrained(tmp_path / "klein")
    adapter = fresh_adapter(pipe).save(tmp_path / "adapter.safetensors")
    for name in flux2_klein().published[1:]:
        (tmp_path / WEIGHTS[name].name).write_bytes(name.encode())
    monkeypatch.setenv("PULID_WEIGHTS", str(tmp_path))
    models = hash_models([locate("arcface"), locate("eva")])
    identity = replace(anna, models=models).save(tmp_path / "anna.safetensors")
    options = ["--preset", "flux2-klein", "--base", tmp_path / "klein", "--adapter", adapter]
    options += ["--size", "32x32", "--text-tokens", 10, "--seed", 7]

    def generate(folder: str, *more: object) -> np.ndarray:
        done = pulid("generate", "portrait", *options, *more, "-o", tmp_path / folder)
        assert done.code == 0, done.err
        (path,) = (tmp_path / folder).iterdir()
        return np.asarray(Image.open(path))

    shown = generate("shown", "--id", identity)
    assert shown.shape == (32, 32, 3)
    assert np.array_equal(generate("again", "--id", identity), shown)
    nobody = generate("nobody")
    assert not np.array_equal(nobody, shown)
    assert np.array_equal(generate("scale-0", "--id", identity, "--scale", 0), nobody)


def test_without_an_adapter_it_stops_with_one_sentence(pulid: Run, tmp_path: Path) -> None:
    done = pulid("generate", "portrait", "--preset", "flux2-klein", "-o", tmp_path / "out")
    assert done.is_one_sentence
    assert done.err.strip() == (
        "pulid: nobody has published a PuLID for FLUX.2; train one with "
        "`pulid train flux2_klein_stage1`, and pass its file with --adapter."
    )
    listed = pulid("presets", "list").out
    assert "flux2-klein\tPuLID on FLUX.2 klein 4B, with your own adapter\t4\t-\t" in listed
