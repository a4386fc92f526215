"""A person for the tests of the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from openpulid.world.gallery import render_portrait


@pytest.fixture(scope="session")
def anna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("people") / "anna.png"
    render_portrait(1_000_007).save(file)
    return file
