"""`pulid identify`: from images to an identity file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from openpulid.identity.identity import Identity
from openpulid.methods.pulid import IDFormer, PuLIDFlux
from openpulid.pipelines.presets import MINIATURE
from tests.cli.conftest import FakeStudio, Run
from tests.support import tiny_flux


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the label of every decoded image."""
    from openpulid.io import images

    labels: list[str] = []
    decode = images._decode

    def record(*arguments: Any, **options: Any) -> Any:
        labels.append(next(value for value in arguments if isinstance(value, str)))
        return decode(*arguments, **options)

    monkeypatch.setattr(images, "_decode", record)
    return labels


def test_identity_file_is_private(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    out = tmp_path / "who" / "anna.safetensors"
    assert pulid("identify", anna, anna, "-o", out).code == 0
    assert out.stat().st_mode & 0o777 == 0o600
    assert Identity.load(out).photos == 2


def test_face_order_and_fusion_reach_the_identity(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    show = tmp_path / "seen" / "faces.png"
    out = tmp_path / "a.safetensors"
    face = ("--face", 1, "--order", "left-right")
    done = pulid("identify", anna, anna, "-o", out, *face, "--fusion", "mean", "--show", show)
    assert done.code == 0, done.err
    identity = Identity.load(out)
    assert (identity.photos, identity.num_sources) == (1, 2)
    assert float(identity.id_cond[0, 0, 0]) == 20  # of two faces from the left the second
    assert Image.open(show).size == (2 * 512, 2 * 512)


def test_options_without_effect_are_reported(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "a.safetensors"
    refused = pulid("identify", anna, "--face", "all", "-o", out)
    assert refused.is_one_sentence and "--face all lists the faces; leave out -o" in refused.err
    assert pulid("identify", anna, anna, "--fusion", "mean", "-o", out).code == 0
    assert "fusion" not in caplog.text
    assert pulid("identify", anna, "--fusion", "mean", "-o", out).code == 0
    assert "--fusion has no effect on a single image" in caplog.text


@pytest.mark.parametrize("show", [False, True])
def test_image_is_decoded_once_and_faces_are_detected_once(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, decodes: list[str], show: bool
) -> None:
    more = ("--show", tmp_path / "faces.png") if show else ()
    assert pulid("identify", anna, "-o", tmp_path / "anna.safetensors", *more).code == 0
    assert decodes == [str(anna)]
    assert studio.extractor.detection.count == 1


def test_generate_decodes_once_and_detects_once(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, decodes: list[str]
) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (96, 96), 255).save(mask)
    done = pulid("generate", "portrait", "--id", anna, "--mask", mask, "-o", tmp_path)
    assert done.code == 0, done.err
    assert sorted(decodes) == sorted([str(anna), str(mask)])
    assert studio.extractor.detection.count == 1


def test_no_base_model_is_loaded(pulid: Run, anna: Path, tmp_path: Path) -> None:
    """The directory has the miniature's face models alone, and a pipeline that cannot be loaded."""
    pulid("world", "person", "--seed", 1_000_007, "-o", anna, "--overwrite")
    mine = tmp_path / "mine"
    (mine / "pipeline").mkdir(parents=True)
    (mine / "pipeline" / "model_index.json").write_text("{}")
    for name in ("detector", "recognition-encoder", "vision-encoder"):
        (mine / f"{name}.safetensors").symlink_to(MINIATURE / f"{name}.safetensors")
    files = (tmp_path / "0.safetensors", tmp_path / "1.safetensors")
    for file, options in zip(files, (("--preset", mine), ()), strict=True):
        done = pulid("identify", anna, "-o", file, *options)
        assert done.code == 0, done.err
    one, other = (Identity.load(file) for file in files)
    assert torch.equal(one.id_cond, other.id_cond)


def flux_adapter() -> PuLIDFlux:
    """An adapter that reads the features of the fake extractor."""
    torch.manual_seed(0)
    sizes = {**tiny_flux.SMALL, "width": 4, "vit_dim": 2}
    transformer = tiny_flux.tiny_transformer()
    return PuLIDFlux.for_transformer(
        transformer, IDFormer(**sizes, output_dim=16, hidden_dim=16), dim_head=8, heads=2
    )


def test_tokens_are_written_for_stable_diffusion_cpp(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = pytest.importorskip("gguf")
    adapter = flux_adapter()
    models = {"models": json.dumps(studio.extractor.models)}
    adapter.save(tmp_path / "weights" / "pulid_flux_v0.9.1.safetensors", models)
    monkeypatch.setenv("PULID_WEIGHTS", str(tmp_path / "weights"))
    out = tmp_path / "anna.gguf"
    done = pulid("identify", anna, "-o", out, "--for", "flux")
    assert (done.code, done.out) == (0, f"{out}\n"), done.err
    assert out.stat().st_mode & 0o777 == 0o600
    (identity,) = studio.extractor.extract(studio.extractor.detection.detect(torch.ones(1))[:1])
    expected = adapter.encode(identity.id_cond, identity.hidden)[0]
    reader = gguf.GGUFReader(out)
    assert reader.get_field("general.architecture").contents() == "pulid"
    assert reader.get_field("pulid.version").contents() == 1
    (tensor,) = reader.tensors
    assert (tensor.name, list(tensor.shape)) == ("pulid_id", [16, len(expected)])  # in reverse
    assert torch.equal(torch.from_numpy(tensor.data.copy()), expected.half())
    again = pulid("identify", anna, "-o", out, "--for", "flux", "--face", 0)
    assert again.is_one_sentence and "--overwrite" in again.err
    sdxl = pulid("identify", anna, "-o", out, "--for", "flux", "--preset", "sdxl")
    assert sdxl.is_one_sentence and "preset 'sdxl' has no encoder of PuLID" in sdxl.err


def test_mistakes_of_an_export_are_reported_first(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PULID_WEIGHTS", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    cases = {
        ("-o", tmp_path / "a.gguf"): "-o must name an identity file, such as a.safetensors",
        ("-o", tmp_path / "a.safetensors", "--for", "flux"): "such as a.gguf",
        ("-o", tmp_path / "a.gguf", "--for", "sdxl"): "--for must be flux, got 'sdxl'",
        ("-o", tmp_path / "a.gguf", "--for", "flux"): "need the package gguf: pip install gguf",
    }
    for options, message in cases.items():
        refused = pulid("identify", anna, *options)
        assert refused.is_one_sentence and message in refused.err
    assert not studio.extractor.detection.count


def test_all_faces_are_listed(pulid: Run, anna: Path) -> None:
    pulid("world", "person", "--seed", 1_000_007, "-o", anna, "--overwrite")
    done = pulid("identify", anna, "--face", "all")
    expected = rf"{anna}: face 0 at \d+,\d+ to \d+,\d+, score [01]\.\d\d\n"
    assert done.code == 0 and re.fullmatch(expected, done.out), done.err
    assert list(anna.parent.glob("*.safetensors")) == []
