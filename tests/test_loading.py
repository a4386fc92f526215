"""A FLUX transformer alone for a base: a single file, a folder, GGUF; the preset's pipeline gives the rest, at every level."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch
from people import anna
from safetensors.torch import load_file, save_file
from tiny_flux import fresh, run, tiny_pipe, tiny_transformer

from openpulid.errors import WeightsError
from openpulid.loading import load_pipeline
from openpulid.memory import LEVELS
from openpulid.presets import Preset, flux, on_base, sdxl

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and beside it another transformer: as a folder, and as the single file in it."""
    folder = tmp_path_factory.mktemp("flux")
    tiny_pipe().save_pretrained(folder / "pipeline")
    torch.manual_seed(7)
    tiny_transformer().save_pretrained(folder / "other")
    (folder / "other" / "diffusion_pytorch_model.safetensors").rename(folder / "other.safetensors")
    tiny_transformer().save_pretrained(folder / "third")
    return folder


@pytest.fixture
def preset(folder: Path) -> Preset:
    return replace(flux(folder / "pipeline"), half=False)


def test_what_a_base_is(folder: Path, preset: Preset) -> None:
    assert on_base(preset, folder / "other.safetensors").transformer == folder / "other.safetensors"
    assert on_base(preset, folder / "third").transformer == folder / "third"
    for whole in (folder / "pipeline", "owner/name"):
        assert on_base(preset, whole) == replace(preset, pipeline=whole)
    assert on_base(sdxl(), folder / "other.safetensors").pipeline == folder / "other.safetensors"


@pytest.mark.parametrize("level", LEVELS)
def test_the_chosen_transformer_is_there_at_every_level(folder: Path, preset: Preset, level: str) -> None:
    weights = load_file(folder / "other.safetensors")
    pipe = load_pipeline(replace(on_base(preset, folder / "other.safetensors"), memory=level), CPU)
    own = load_file(folder / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype)), name
    assert not torch.equal(own["x_embedder.weight"], weights["x_embedder.weight"])
    pipe.set_progress_bar_config(disable=True)
    before = run(pipe, steps=1)
    with fresh(pipe).use(anna):
        assert abs(run(pipe, steps=1) - before).max() > 1e-3


def test_a_folder_of_a_transformer(folder: Path, preset: Preset) -> None:
    pipe = load_pipeline(on_base(preset, folder / "third"), CPU)
    weights = load_file(folder / "third" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())
    own = load_file(folder / "pipeline" / "text_encoder_2" / "model.safetensors")
    assert torch.equal(pipe.text_encoder_2.state_dict()["shared.weight"], own["shared.weight"])


@pytest.mark.parametrize("level", ["full", "24gb"])
def test_gguf(folder: Path, preset: Preset, tmp_path: Path, level: str) -> None:
    """Every matrix in blocks of eight bits, which no memory level squeezes once more."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "flux")
    weights = load_file(folder / "other.safetensors")
    for name, value in weights.items():
        small = value.ndim == 2 and value.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(
            name, gguf.quants.quantize(value.numpy(), kind) if small else value.numpy(), raw_dtype=kind if small else None
        )
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    pipe = load_pipeline(replace(on_base(preset, tmp_path / "other.gguf"), memory=level), CPU)
    exact = load_pipeline(on_base(preset, folder / "other.safetensors"), CPU)
    for one in (pipe, exact):
        one.set_progress_bar_config(disable=True)
    assert abs(run(pipe, steps=1) - run(exact, steps=1)).max() < 0.05
    with fresh(exact).use(anna):
        expected = run(exact, steps=1)
    with fresh(pipe).use(anna):
        assert abs(run(pipe, steps=1) - expected).max() < 0.05


@pytest.mark.skipif(find_spec("gguf") is not None, reason="the package gguf is here")
def test_gguf_without_its_package(preset: Preset, tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match="pip install gguf"):
        load_pipeline(on_base(preset, tmp_path / "base.gguf"), CPU)


def test_what_is_no_transformer(folder: Path, preset: Preset, tmp_path: Path) -> None:
    weights = load_file(folder / "other.safetensors")
    save_file({name: x for name, x in weights.items() if not name.startswith("proj_out")}, tmp_path / "less.safetensors")
    save_file({**weights, "proj_out.weight": torch.ones(3, 3)}, tmp_path / "shape.safetensors")
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(3)}, tmp_path / "sdxl.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((folder / "other.safetensors").read_bytes()[:1000])
    torch.save(weights, tmp_path / "pickled.bin")
    for name in ("less.safetensors", "shape.safetensors", "sdxl.safetensors", "cut.safetensors", "pickled.bin"):
        with pytest.raises(WeightsError, match=name) as error:
            load_pipeline(on_base(preset, tmp_path / name), CPU)
        assert "\n" not in str(error.value)


def test_a_pipeline_without_its_t5(folder: Path, preset: Preset, tmp_path: Path) -> None:
    copytree(folder / "pipeline", tmp_path / "lost")
    rmtree(tmp_path / "lost" / "text_encoder_2"), rmtree(tmp_path / "lost" / "tokenizer_2")
    with pytest.raises(WeightsError, match="lost has no text_encoder_2 and no tokenizer_2; FLUX reads with CLIP and T5"):
        load_pipeline(replace(preset, pipeline=tmp_path / "lost"), CPU)


def test_a_base_of_the_other_family(folder: Path, preset: Preset, tmp_path: Path, tiny_pipeline: Any) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "sdxl")
    for one, base in ((preset, tmp_path / "sdxl"), (replace(sdxl(), half=False), folder / "pipeline")):
        with pytest.raises(WeightsError, match="cannot be loaded") as error:
            load_pipeline(on_base(one, base), CPU)
        assert "\n" not in str(error.value)
