"""The nodes list the choices of the package, which they cannot import when they are described."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from openpulid.faces.face import ORDERS
from openpulid.identity.identity import FUSIONS
from openpulid.methods.pulid.projection import PROJECTIONS
from openpulid.pipelines.presets import PULID_MODES

PACK = Path(__file__).parents[2] / "comfyui"


def read_literal(module: str, name: str) -> Any:
    """Read a constant of a module that needs ComfyUI to be imported."""
    for node in ast.parse((PACK / module).read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{module} has no {name}")


@pytest.mark.parametrize(
    ("module", "name", "choices"),
    [
        ("nodes_identity.py", "ORDERS", ORDERS),
        ("nodes_identity.py", "FUSIONS", FUSIONS),
        ("nodes_adapter.py", "PROJECTIONS", PROJECTIONS),
    ],
)
def test_choices_are_those_of_the_package(module: str, name: str, choices: Any) -> None:
    assert set(read_literal(module, name)) == set(choices)


def test_modes_are_those_of_the_package() -> None:
    methods = read_literal("nodes_adapter.py", "METHODS")
    for name, mode in PULID_MODES.items():
        assert methods[name] == (mode.projection, mode.num_zero)
