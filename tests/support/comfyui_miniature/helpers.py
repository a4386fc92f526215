"""What the nodes of this pack share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from comfy_api.latest import io

SUPPORT = Path(__file__).resolve().parents[1]


def describe_loader(node_id: str, *outputs: Any) -> io.Schema:
    """Describe a node without inputs."""
    return io.Schema(node_id=node_id, inputs=[], outputs=list(outputs))


def load_support(name: str) -> ModuleType:
    """Import a helper of the tests by its path: ComfyUI has a package `tests` of its own."""
    full_name = f"openpulid_test_support_{name}"
    if full_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(full_name, SUPPORT / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[full_name] = module
        spec.loader.exec_module(module)
    return sys.modules[full_name]
