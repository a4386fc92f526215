"""Tests of the methods of a run at several scales."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from openpulid.bench.methods import parse_scales, select_presets
from openpulid.bench.run_dir import BASE
from openpulid.bench.suite import load_suite
from openpulid.errors import OptionError
from openpulid.identity.extractor import FaceEmbeddingExtractor
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines.factory import load_detection, share_extractor
from openpulid.pipelines.presets import find_preset, sdxl
from tests.support import tiny_sdxl

SUITE = load_suite("miniature")


def labels(names: list[str], scales: list[float]) -> list[str]:
    return list(select_presets(SUITE, names, scales))


def test_scales_add_a_row_of_each_method() -> None:
    presets = select_presets(SUITE, ["pulid", "faceid"], [0.3, 1.4])
    assert list(presets) == [
        BASE, "pulid", "pulid@0.3", "pulid@1.4", "faceid", "faceid@0.3", "faceid@1.4"
    ]  # fmt: skip
    assert presets["pulid"].defaults.identity.scale == 0.85
    assert presets["pulid@0.3"].defaults.identity.scale == 0.3
    assert presets["faceid@1.4"].models == presets["faceid"].models


def test_no_row_is_added_twice() -> None:
    # the miniature's own scales are .85 and 1
    assert labels(["pulid", "faceid"], [0.85, 1.0]) == [
        BASE, "pulid", "pulid@1", "faceid", "faceid@0.85"
    ]  # fmt: skip
    assert labels(["pulid@0.5", "pulid"], [0.5, 0.6]) == [BASE, "pulid@0.5", "pulid@0.6", "pulid"]
    assert labels([], [0.5]) == [BASE]


def test_method_without_scale_is_run_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "openpulid.bench.methods"):
        selected = labels(["textual-inversion", "dreambooth"], [0.3, 0.5])
    # DreamBooth has a scale: between the weights before and after
    assert selected == [
        BASE, "textual-inversion", "dreambooth", "dreambooth@0.3", "dreambooth@0.5"
    ]  # fmt: skip
    message = "textual-inversion has no scale: --scales does not apply to it."
    assert [record.getMessage() for record in caplog.records] == [message]
    with pytest.raises(OptionError, match=r"textual-inversion has no scale; .* without @0\.5"):
        select_presets(SUITE, ["textual-inversion@0.5"])


def test_scales_of_a_suite_with_its_own_scale_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    data = {"about": "Mine.", "preset": "mini", "seeds": [1], "prompts": [{"text": "portrait"}]}
    path.write_text(json.dumps({**data, "options": {"scale": 0.5}}))
    suite = load_suite(str(path))
    for names, scales in ((["pulid"], [0.3]), (["pulid@0.3"], [])):
        with pytest.raises(OptionError, match="suite mine sets the scale of all methods"):
            select_presets(suite, names, scales)
    assert list(select_presets(suite, ["pulid"])) == [BASE, "pulid"]


def test_adapter_of_other_face_models_is_refused() -> None:
    """Also by a run, which shares the extractor of the base."""
    pipe = tiny_sdxl.pipe()
    adapter = PuLID.for_unet(pipe.unet, IDEncoder(16, 32, vit_dim=8, hidden_dim=16))
    trained = PuLID.for_unet(pipe.unet, IDEncoder(16, 32, vit_dim=8, hidden_dim=16))
    trained.models = {"auraface": "a"}
    detection = load_detection(find_preset("mini").models)
    extractor = FaceEmbeddingExtractor(detection, nn.Identity(), {"glintr100": "antelopev2's"})
    cpu = torch.device("cpu")
    assert share_extractor(extractor, sdxl(), sdxl(), adapter, cpu) is extractor
    with pytest.raises(OptionError, match="trained with auraface"):
        share_extractor(extractor, sdxl(), sdxl(), trained, cpu)


def test_scales_are_parsed() -> None:
    assert parse_scales("0.3, .5,1,0.3,") == [0.3, 0.5, 1.0]
    for text in ("much", "-1", "nan", "0.3;0.5", ","):
        with pytest.raises(OptionError, match="expected numbers with commas"):
            parse_scales(text)
