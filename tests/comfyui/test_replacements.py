"""Workflows of other PuLID packs in ComfyUI's own server: their nodes are replaced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.comfyui import requires_comfyui
from tests.support.comfyui_server import Graph
from tests.support.comfyui_workflows import (
    MINIATURE,
    find_key,
    load_flux_workflow,
    load_workflow,
    without_pulid,
)

pytestmark = requires_comfyui

OLD_NODES = {
    "ApplyPulid",
    "ApplyPulidAdvanced",
    "ApplyPulidFlux",
    "PulidModelLoader",
    "PulidInsightFaceLoader",
    "PulidEvaClipLoader",
    "PulidFluxModelLoader",
    "PulidFluxInsightFaceLoader",
    "PulidFluxEvaClipLoader",
}


def make_node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def use_old_nodes(graph: Graph, kind: str, widgets: dict[str, Any]) -> Graph:
    """Return a workflow with the nodes and links of the other pack, as its page queues them.

    Args:
        graph: an example workflow.
        kind: class of the node that applies PuLID.
        widgets: its values.
    """
    apply, identity = find_key(graph, "OpenPulidApply"), find_key(graph, "OpenPulidIdentity")
    faces = find_key(graph, "OpenPulidLoadFaceModels")
    infix, adapter = ("Flux", "pulid_flux") if kind == "ApplyPulidFlux" else ("", "pulid")
    inputs = graph[apply]["inputs"]
    links = {
        "model": inputs["model"],
        adapter: inputs["pulid"],
        "eva_clip": [identity, 0],
        "face_analysis": [faces, 0],
        "image": graph[identity]["inputs"]["image"],
    }
    if "mask" in inputs:
        links["attn_mask"] = inputs["mask"]
    old = {
        apply: make_node(kind, **links, **widgets),
        identity: make_node(f"Pulid{infix}EvaClipLoader"),
        faces: make_node(f"Pulid{infix}InsightFaceLoader", provider="CPU"),
    }
    loader = inputs["pulid"][0]
    if graph[loader]["class_type"] == "OpenPulidLoad":
        old[loader] = make_node(f"Pulid{infix}ModelLoader", pulid_file=MINIATURE)
    return {**graph, **old}


def use_miniature_faces(graph: Graph, kind: str) -> Graph:
    """Exchange the face models of photos, which an old workflow means, for the miniature's."""
    faces = make_node("OpenPulidLoadFaceModels", pack=MINIATURE, device="cpu")
    links = {"face_analysis": ["faces", 0]}
    apply = find_key(graph, kind)
    node = {**graph[apply], "inputs": {**graph[apply]["inputs"], **links}}
    return {**graph, apply: node, "faces": faces}


SPAN = {"weight": 0.7, "start_at": 0.1, "end_at": 0.9}
OUR_SPAN = {"scale": 0.7, "start": 0.1, "end": 0.9}
ADVANCED = {"projection": "ortho", "fidelity": 12, "noise": 0.0}


@pytest.mark.parametrize(
    ("kind", "widgets", "values", "has_mask"),
    [
        ("ApplyPulid", {"method": "fidelity"}, {"projection": "ortho_v2", "num_zero": 8}, False),
        ("ApplyPulid", {"method": "style"}, {"projection": "ortho", "num_zero": 16}, True),
        ("ApplyPulid", {"method": "neutral"}, {"projection": "none", "num_zero": 0}, False),
        ("ApplyPulidAdvanced", ADVANCED, {"projection": "ortho", "num_zero": 12}, True),
        ("ApplyPulidFlux", {}, {}, False),
        ("ApplyPulidFlux", {}, {}, True),
    ],
)
def test_old_node_gives_the_image_of_the_new_one(server, kind, widgets, values, has_mask) -> None:
    load = load_flux_workflow if kind == "ApplyPulidFlux" else load_workflow
    graph = load(OpenPulidApply={**OUR_SPAN, **values})
    if has_mask:
        graph["mask"] = make_node("LoadImageMask", image="left.png", channel="red")
        graph[find_key(graph, "OpenPulidApply")]["inputs"]["mask"] = ["mask", 0]
    (ours,) = server.images(graph)
    (base,) = server.images(without_pulid(graph))
    assert not np.array_equal(ours, base)
    old = use_miniature_faces(use_old_nodes(graph, kind, {**SPAN, **widgets}), kind)
    (theirs,) = server.images(old)
    assert np.array_equal(theirs, ours)


def test_old_workflow_names_the_face_models_that_it_needs(server) -> None:
    """The whole old workflow passes the server's checks."""
    widgets = {"method": "fidelity", **SPAN}
    entry = server.run(use_old_nodes(load_workflow(), "ApplyPulid", widgets))
    ((_, error),) = [x for x in entry["status"]["messages"] if x[0] == "execution_error"]
    assert error["node_type"] == "OpenPulidLoadFaceModels"
    assert "pulid weights get" in error["exception_message"]


@pytest.fixture(scope="module")
def replacements(server) -> dict[str, Any]:
    """What the page offers: old node -> replacements."""
    if server.request("/node_replacements")[0] != 200:
        pytest.skip("this version of ComfyUI has no node replacements")
    return server.get("/node_replacements")


def test_page_offers_replacements_with_inputs_and_outputs_that_exist(server, replacements) -> None:
    assert set(replacements) >= OLD_NODES
    for old in OLD_NODES:
        (replacement,) = replacements[old]
        (node,) = server.get(f"/object_info/{replacement['new_node_id']}").values()
        inputs = {**node["input"]["required"], **node["input"].get("optional", {})}
        assert {entry["new_id"] for entry in replacement["input_mapping"]} <= set(inputs)
        assert replacement["output_mapping"] == [{"new_idx": 0, "old_idx": 0}]


@pytest.mark.parametrize(
    ("old", "stored", "values"),
    [
        (
            "ApplyPulid",
            ["style", 0.8, 0, 1],
            {"method": "style", "scale": 0.8, "start": 0, "end": 1},
        ),
        (
            "ApplyPulidAdvanced",
            [0.7, "ortho", 12, 0.0, 0.1, 0.9],
            {"scale": 0.7, "projection": "ortho", "num_zero": 12, "start": 0.1, "end": 0.9},
        ),
        ("ApplyPulidFlux", [0.9, 0.2, 1], {"scale": 0.9, "start": 0.2, "end": 1}),
        ("PulidModelLoader", ["v1.safetensors"], {"file": "v1.safetensors"}),
        ("PulidFluxModelLoader", ["flux.safetensors"], {"file": "flux.safetensors"}),
    ],
)
def test_page_moves_the_stored_values(replacements, old, stored, values) -> None:
    """A workflow of the page stores the values of a node without their names."""
    (replacement,) = replacements[old]
    named = dict(zip(replacement["old_widget_ids"], stored, strict=True))
    moved = {
        entry["new_id"]: named[entry["old_id"]]
        for entry in replacement["input_mapping"]
        if entry.get("old_id") in named
    }
    assert moved == values
