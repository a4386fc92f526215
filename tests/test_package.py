"""The public names of the package."""

from __future__ import annotations

import warnings

import pytest
from PIL import Image

import openpulid as pulid
from openpulid.pipelines.request import GenerationRequest


def test_public_names_are_listed_and_exist() -> None:
    assert dir(pulid) == sorted(pulid.__all__)
    assert {"PulidError", "GenerationResult", "load"} <= set(dir(pulid))
    assert not {"Any", "import_module", "annotations", "TYPE_CHECKING"} & set(dir(pulid))
    assert all(getattr(pulid, name) is not None for name in dir(pulid))
    with pytest.raises(AttributeError, match="no attribute 'zebra'"):
        pulid.zebra  # noqa: B018
    assert issubclass(pulid.PulidError, ValueError)


def test_result_is_printed_in_one_line() -> None:
    request = GenerationRequest(prompt="portrait " * 100)
    result = pulid.GenerationResult(
        [Image.new("RGB", (96, 64))] * 6,
        [request.model_copy(update={"seed": seed}) for seed in range(6)],
    )
    assert repr(result) == "GenerationResult(6 images, size: 96x64, seeds: 0, 1, 2, 3, ...)"
    assert repr(pulid.GenerationResult([], [])) == "GenerationResult(0 images, size: none, seeds: )"


def test_loading_shows_no_warning() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FutureWarning)
        pulid.load("mini-lightning", device="cpu")
    assert not [each for each in caught if issubclass(each.category, FutureWarning)]
