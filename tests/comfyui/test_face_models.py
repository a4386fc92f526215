"""The choices of Load face models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openpulid.errors import WeightsError
from tests.support import comfyui
from tests.support.comfyui import requires_comfyui

pytestmark = requires_comfyui


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The nodes, with no weights installed."""
    monkeypatch.setenv("PULID_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    comfyui.import_comfyui()
    return comfyui.import_pack("nodes_identity")


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("antelopev2", {"detector", "arcface", "parsing", "eva"}),
        ("open, for commercial use", {"yunet", "auraface", "selfie-multiclass", "eva"}),
    ],
)
def test_choice_loads_the_models_of_a_training(nodes: Any, choice: str, names: set[str]) -> None:
    (pack, _) = nodes.LoadFaceModels.define_schema().inputs
    assert choice in pack.options
    with pytest.raises(WeightsError) as error:
        nodes.LoadFaceModels.execute(choice, "cpu")
    _, _, command = str(error.value).partition("pulid weights get ")
    assert set(command.partition("`")[0].split()) == names
