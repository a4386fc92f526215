"""The example workflows with small models, and changes to a workflow in the API's format."""

from __future__ import annotations

import copy
import json
from typing import Any

from tests.support.comfyui import PACK
from tests.support.comfyui_server import Graph

MINIATURE = "miniature (synthetic people)"
WORKFLOWS = PACK / "example_workflows" / "api"

SDXL_LOADERS = {"CheckpointLoaderSimple": "TestLoadMiniature"}
FLUX_LOADERS = {
    "UNETLoader": "TestLoadFlux",
    "DualCLIPLoader": "TestLoadTextEncoder",
    "VAELoader": "TestLoadAutoencoder",
    "OpenPulidLoad": "TestLoadFluxAdapter",
}
"""Class of a loader -> that of the test pack in its place."""

SMALL_VALUES: dict[str, dict[str, Any]] = {
    "OpenPulidLoad": {"file": MINIATURE},
    "OpenPulidLoadFaceModels": {"pack": MINIATURE},
}


def load_workflow(name: str = "sdxl", **inputs: dict[str, Any]) -> Graph:
    """Return an example workflow for SDXL with the miniature's models.

    Args:
        name: of the workflow.
        inputs: class of a node -> values for all of its nodes.
    """
    values: dict[str, dict[str, Any]] = {
        "EmptyLatentImage": {"width": 96, "height": 96},
        "KSampler": {"steps": 4, "cfg": 3.0, "scheduler": "sgm_uniform"},
        "OpenPulidApply": {"projection": "none", "num_zero": 0},
        "CLIPTextEncode": {"text": "portrait of a person"},
    }
    return _load(name, SDXL_LOADERS, values, inputs)


def load_flux_workflow(model: str = "TestLoadFlux", **inputs: dict[str, Any]) -> Graph:
    """Return the example workflow for FLUX with tiny random models.

    Args:
        model: class of the node in place of the model's loader.
        inputs: class of a node -> values for all of its nodes.
    """
    values: dict[str, dict[str, Any]] = {
        "EmptySD3LatentImage": {"width": 64, "height": 64},
        "KSampler": {"steps": 4},
    }
    return _load("flux", {**FLUX_LOADERS, "UNETLoader": model}, values, inputs)


def _load(
    name: str,
    loaders: dict[str, str],
    values: dict[str, dict[str, Any]],
    inputs: dict[str, dict[str, Any]],
) -> Graph:
    graph: Graph = json.loads((WORKFLOWS / f"{name}.json").read_text("utf-8"))
    for node in graph.values():
        kind = node["class_type"]
        for changes in (SMALL_VALUES, values, inputs):
            node["inputs"].update(changes.get(kind, {}))
        node["class_type"] = loaders.get(kind, kind)
    return graph


def find_key(graph: Graph, kind: str) -> str:
    """Return the key of the first node of a class."""
    return next(key for key, node in graph.items() if node["class_type"] == kind)


def find_inputs(graph: Graph, kind: str) -> dict[str, Any]:
    """Return the inputs of the first node of a class."""
    return graph[find_key(graph, kind)]["inputs"]


def without_pulid(graph: Graph) -> Graph:
    """Return the workflow without the nodes of the pack."""
    graph = copy.deepcopy(graph)
    find_inputs(graph, "KSampler")["model"] = find_inputs(graph, "OpenPulidApply")["model"]
    return {key: node for key, node in graph.items() if not is_pulid(node["class_type"])}


def is_pulid(kind: str) -> bool:
    """Whether a node needs the pack."""
    return kind.startswith("OpenPulid") or kind == "TestLoadFluxAdapter"


def add_workflow(graph: Graph, other: Graph, shared: tuple[str, ...] = ()) -> Graph:
    """Return both workflows as one.

    Args:
        graph: one workflow.
        other: gets new keys.
        shared: keys of nodes that both use.
    """
    merged = copy.deepcopy(graph)
    for key, node in copy.deepcopy(other).items():
        if key in shared:
            continue
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] not in shared:
                node["inputs"][name] = [f"other-{value[0]}", value[1]]
        merged[f"other-{key}"] = node
    return merged
