"""What the service says about its presets."""

from __future__ import annotations

import httpx
import pytest

from openpulid.pipelines.presets import find_preset
from openpulid.pipelines.request import ModelSelection
from openpulid.pipelines.selection import with_method
from openpulid.service.catalog import Catalog
from tests.service.api.conftest import check_problem


def test_presets_have_methods_sizes_and_licenses(client: httpx.Client) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["mini", "mini-lightning"]
    for model in models:
        preset = find_preset(model["id"])
        assert model == client.get(f"/v1/models/{model['id']}").json()
        assert model["size"] == {"native": 96, "multiple": 8, "min": 16, "max": 160}
        license = {"weights": "miniature", "license": "Apache-2.0", "commercial": True}
        assert model["licenses"] == [license]
        methods = {method["name"]: method for method in model["methods"]}
        assert list(methods) == [
            "pulid", "elite", "face0", "faceid", "fastcomposer", "instantid", "photomaker",
            "photoverse", "w-plus",
        ]  # fmt: skip
        for name, method in methods.items():
            changed = with_method(preset, name)
            assert method["options"] == sorted(changed.options)
            assert method["defaults"] == changed.defaults.model_dump(exclude_none=True)


def test_methods_without_the_memory_level_of_the_server_are_not_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Baselines on SDXL have no memory levels, and would not fit."""
    monkeypatch.setattr("openpulid.service.catalog.check_models", lambda preset: None)
    monkeypatch.setattr("openpulid.service.catalog.find_usable_weights", lambda preset: ())
    monkeypatch.setattr(
        "openpulid.service.catalog.find_installed_methods", lambda preset: ("pulid", "faceid")
    )
    for memory, expected in ((None, ["pulid", "faceid"]), ("8gb", ["pulid"])):
        catalog = Catalog([ModelSelection(preset="sdxl", memory=memory)])
        assert list(catalog.methods("sdxl")) == expected


def test_unknown_preset(client: httpx.Client) -> None:
    response = client.get("/v1/models/sdxl")
    check_problem(response, 404, "no model 'sdxl'; choose one of mini, mini-lightning.")
