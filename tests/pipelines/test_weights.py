"""Missing weights are all named, with the one command that downloads them."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from openpulid.errors import WeightsError
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS
from openpulid.pipelines.factory import load_extractor
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import MINIATURE, Preset, find_preset, flux, sdxl
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.pipelines.selection import resolve_preset, with_base, with_method
from openpulid.pipelines.weights import missing_sources, missing_weights, require_weights
from openpulid.training.pulid import find_recipe
from openpulid.training.pulid.photo_models import load_models


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights, but for those in this folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    return tmp_path / "weights"


def install(folder: Path, *names: str) -> None:
    for name in names:
        (folder / WEIGHTS[name].file).parent.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS[name].file).write_bytes(b"weights")


def message(preset: Preset) -> str:
    with pytest.raises(WeightsError) as error:
        load(preset, device="cpu")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("preset", [sdxl, flux])
def test_all_missing_weights_of_a_preset_are_named(preset: Preset) -> None:
    text = message(preset())
    for name in preset().published:
        assert f"{name} ({WEIGHTS[name].name})" in text
    assert f"`pulid weights get {preset().name}` downloads them (about " in text


def test_command_names_what_is_missing(folder: Path) -> None:
    install(folder, *(name for name in sdxl().published if name not in ("juggernaut", "eva")))
    assert "`pulid weights get sdxl`" in message(sdxl())
    install(folder, "eva")
    assert (
        "installed: juggernaut (RunDiffusion/Juggernaut-XL-v9); `pulid weights get juggernaut`"
        in (message(sdxl()))
    )
    # another base of the hub, and another method
    other = with_method(with_base(sdxl(), "owner/name"), "faceid")
    assert "`pulid weights get owner/name faceid buffalo-l` downloads" in message(other)
    assert missing_sources(other.models.sources) == ["owner/name", "faceid", "buffalo-l"]
    assert missing_weights(other) == ["faceid", "buffalo-l"]


def test_extractor_needs_only_its_own_weights() -> None:
    with pytest.raises(WeightsError) as error:
        load_extractor(sdxl(), torch.device("cpu"))
    text = str(error.value)
    assert all(name in text for name in ("detector", "arcface", "parsing", "eva"))
    assert "juggernaut" not in text and "pulid-v1.1" not in text
    assert "`pulid weights get detector arcface eva parsing` downloads them" in text


def test_training_names_all_missing_weights() -> None:
    with pytest.raises(WeightsError) as error:
        load_models(find_recipe("sdxl_stage3"), torch.device("cpu"))
    text = str(error.value)
    for name in ("sdxl-base", "lightning-4step", "detector", "eva", "arcface-loss"):
        assert f"{name} (" in text
    assert "pulid-v1" not in text


def test_files_that_do_not_exist_are_left_to_their_loader(tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    assert missing_sources([missing, str(missing), "eva"]) == [str(missing), "eva", str(missing)]
    require_weights(sdxl(), [missing, str(missing)])


def test_folder_of_a_flux_miniature_can_have_any_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(MINIATURE / "flux" / "pipeline", mine / "pipeline")
    models = find_preset(str(mine)).models
    assert models.pipeline == mine / "pipeline"
    assert models.adapter == mine / "pulid-stage3.safetensors"
    assert models.detector == tmp_path / "detector.safetensors"


def test_directory_and_adapter_can_be_spelled_in_any_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MINIATURE.parent)
    adapter = "./weights//pulid-stage2.safetensors"
    for name in ("weights", "weights/", "./weights"):
        selection = ModelSelection(preset=name, adapter=adapter)
        preset = resolve_preset(selection)
        request = GenerationRequest(prompt="portrait", model=selection)
        assert preset.resolve(request).model.preset == name
        plain = selection.model_copy(update={"preset": "weights"})
        preset.resolve(GenerationRequest(prompt="portrait", model=plain))  # the same models
