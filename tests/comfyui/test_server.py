"""The node pack in ComfyUI's own server, over HTTP."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.comfyui import PACK, requires_comfyui
from tests.support.comfyui_server import TEST_PACK, Graph, Server, both_packs, serve

pytestmark = requires_comfyui

MINIATURE = "miniature (synthetic people)"
WORKFLOWS = PACK / "example_workflows" / "api"
NODES = (
    "OpenPulidLoad",
    "OpenPulidLoadFaceModels",
    "OpenPulidIdentity",
    "OpenPulidLoadIdentity",
    "OpenPulidSaveIdentity",
    "OpenPulidApply",
    "OpenPulidApplyImages",
    "OpenPulidSimilarity",
    "OpenPulidFacePreview",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("comfyui"), *both_packs()) as server:
        sides = {"left": (0, 48), "right": (48, 96)}
        for name, (first, end) in sides.items():
            mask = np.zeros((96, 96, 3), np.uint8)
            mask[:, first:end] = 255
            Image.fromarray(mask).save(server.directory / "input" / f"{name}.png")
        yield server


@pytest.fixture(scope="module")
def plain_server(tmp_path_factory) -> Iterator[Server]:
    """A server that never loads the node pack."""
    with serve(tmp_path_factory.mktemp("plain"), TEST_PACK) as server:
        yield server


def load_workflow(name: str = "sdxl", **inputs: dict[str, Any]) -> Graph:
    """Return an example workflow with the miniature's models.

    Args:
        name: of the workflow.
        inputs: class of a node -> values for all of its nodes.
    """
    graph: Graph = json.loads((WORKFLOWS / f"{name}.json").read_text())
    values: dict[str, dict[str, Any]] = {
        "OpenPulidLoad": {"file": MINIATURE},
        "OpenPulidLoadFaceModels": {"pack": MINIATURE},
        "EmptyLatentImage": {"width": 96, "height": 96},
        "KSampler": {"steps": 4, "cfg": 3.0, "scheduler": "sgm_uniform"},
        "OpenPulidApply": {"projection": "none", "num_zero": 0},
        "CLIPTextEncode": {"text": "portrait of a person"},
    }
    for node in graph.values():
        kind = node["class_type"]
        node["inputs"].update({**values.get(kind, {}), **inputs.get(kind, {})})
        if kind == "CheckpointLoaderSimple":
            node.update(class_type="TestLoadMiniature", inputs={})
    return graph


def find_node(graph: Graph, kind: str) -> dict[str, Any]:
    return next(node for node in graph.values() if node["class_type"] == kind)


def without_pulid(graph: Graph) -> Graph:
    graph = copy.deepcopy(graph)
    find_node(graph, "KSampler")["inputs"]["model"] = ["1", 0]
    return {key: node for key, node in graph.items() if "OpenPulid" not in node["class_type"]}


def test_all_nodes_are_listed(server) -> None:
    for name in NODES:
        (node,) = server.get(f"/object_info/{name}").values()
        assert node["category"] == "openpulid" and node["description"]
    assert not [name for name in server.get("/object_info") if "ulid" in name and name not in NODES]


def test_example_shows_the_person_and_nothing_else_changes(server, plain_server) -> None:
    graph = load_workflow()
    (shown,) = server.images(graph)
    assert shown.shape == (96, 96, 3)
    (base,) = server.images(without_pulid(graph))
    assert np.abs(shown - base).mean() > 2
    (without_weight,) = server.images(load_workflow(OpenPulidApply={"scale": 0.0}))
    assert np.array_equal(without_weight, base)
    (never_loaded,) = plain_server.images(without_pulid(graph))
    assert np.array_equal(never_loaded, base)


def test_second_run_and_run_after_unloading_give_the_same_image(server) -> None:
    (first,) = server.images(load_workflow(SaveImage={"filename_prefix": "first"}))
    (second,) = server.images(load_workflow(SaveImage={"filename_prefix": "second"}))
    status, _ = server.request("/free", {"unload_models": True, "free_memory": True})
    assert status == 200
    (third,) = server.images(load_workflow(SaveImage={"filename_prefix": "third"}))
    assert np.array_equal(first, second) and np.array_equal(first, third)


def test_two_models_in_one_workflow_do_not_mix(server) -> None:
    graph = load_workflow()
    (anna,) = server.images(graph)
    (ben,) = server.images(load_workflow(LoadImage={"image": "ben.png"}))
    second = load_workflow(LoadImage={"image": "ben.png"})
    # one loader, two identities, two samplers
    for key, node in second.items():
        if key == "1":
            continue
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] != "1":
                node["inputs"][name] = [f"2{value[0]}", value[1]]
        graph[f"2{key}"] = node
    images = server.images(graph)
    assert {image.tobytes() for image in images} == {anna.tobytes(), ben.tobytes()}


def test_two_people_with_masks(server) -> None:
    (both,) = server.images(load_workflow("sdxl-two-people"))
    graph = load_workflow("sdxl-two-people")
    find_node(graph, "KSampler")["inputs"]["model"] = ["6", 0]
    (one,) = server.images(graph)
    difference = np.abs(both - one).mean(axis=(0, 2))
    assert difference[48:].mean() > 1.5 * difference[:48].mean()


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("OpenPulidApply", {"scale": -1.0}, "scale must be a number of 0 or more"),
        ("OpenPulidApply", {"start": 2.0}, "start and end must be fractions of the schedule"),
        ("OpenPulidApply", {"start": 0.6, "end": 0.5}, "start 0.6 is not before end 0.5"),
        ("OpenPulidApply", {"num_zero": -3}, "num_zero must be an integer"),
    ],
)
def test_bad_values_are_refused_before_the_run(server, kind, value, message) -> None:
    status, answer = server.queue(load_workflow(**{kind: value}))
    assert status == 400
    (problem,) = answer["node_errors"].values()
    assert message in json.dumps(problem["errors"])


def test_image_without_face_names_what_was_tried(server) -> None:
    entry = server.run(load_workflow(LoadImage={"image": "gray.png"}))
    assert entry["status"]["status_str"] == "error"
    message = json.dumps(entry["status"]["messages"])
    assert "no face detected in its 96 x 96 pixels" in message and "one size" in message


def test_identity_is_saved_loaded_and_compared(server) -> None:
    graph = load_workflow()
    graph = {key: graph[key] for key in ("3", "4", "5")}
    graph["6"] = {
        "class_type": "OpenPulidSaveIdentity",
        "inputs": {"identity": ["5", 0], "name": "anna"},
    }
    for number in (1, 2):  # the second is a new file
        graph["5"]["inputs"]["fusion"] = ("concat", "mean")[number - 1]
        assert server.run(graph)["status"]["status_str"] == "success"
    folder = server.directory / "output" / "identities"
    assert {path.name for path in folder.iterdir()} == {
        "anna.safetensors",
        "anna_2.safetensors",
    }
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    compared = {
        key: graph[key] for key in ("3", "4", "5")
    } | {
        "7": {"class_type": "OpenPulidLoadIdentity", "inputs": {"file": "anna.safetensors"}},
        "8": {
            "class_type": "OpenPulidSimilarity",
            "inputs": {"face_models": ["3", 0], "identity": ["5", 0], "other": ["7", 0]},
        },
    }  # fmt: skip
    entry = server.run(compared)
    assert entry["status"]["status_str"] == "success", entry["status"]
    assert entry["outputs"]["8"]["text"] == ["1.000"]
    graph["6"]["inputs"]["name"] = "../anna"
    status, answer = server.queue(graph)
    assert status == 400 and "file name without a folder" in json.dumps(answer)


def test_face_preview_shows_the_crops(server) -> None:
    graph = load_workflow()
    graph = {key: graph[key] for key in ("3", "4")}
    graph["5"] = {
        "class_type": "OpenPulidFacePreview",
        "inputs": {
            "face_models": ["3", 0],
            "image": ["4", 0],
            "face_index": 0,
            "face_order": "large-small",
        },
    }
    graph["6"] = {
        "class_type": "SaveImage",
        "inputs": {"images": ["5", 0], "filename_prefix": "faces"},
    }
    (sheet,) = server.images(graph)
    assert sheet.shape[1] > sheet.shape[0]


OLD = {
    "2": ("PulidModelLoader", {"pulid_file": MINIATURE}),
    "3": ("PulidInsightFaceLoader", {"provider": "CPU"}),
    "5": ("PulidEvaClipLoader", {}),
}


def test_old_workflow_runs_with_the_same_meaning(server) -> None:
    """The server replaces the nodes of other packs; the miniature's face models are set after."""
    if server.request("/node_replacements")[0] != 200:
        pytest.skip("this version of ComfyUI has no node replacements")
    replacements = server.get("/node_replacements")
    assert {"ApplyPulid", "ApplyPulidAdvanced", "ApplyPulidFlux"} <= set(replacements)
    graph = load_workflow()
    for key, (kind, inputs) in OLD.items():
        graph[key].update(class_type=kind, inputs=inputs)
    graph["6"].update(
        class_type="ApplyPulidAdvanced",
        inputs={
            "model": ["1", 0], "pulid": ["2", 0], "eva_clip": ["5", 0], "face_analysis": ["30", 0],
            "image": ["4", 0], "weight": 0.7, "projection": "ortho", "fidelity": 8, "noise": 0.0,
            "start_at": 0.1, "end_at": 0.9,
        },
    )  # fmt: skip
    # the face models that an old workflow names are those of photos, not the miniature's
    graph["30"] = {
        "class_type": "OpenPulidLoadFaceModels",
        "inputs": {"pack": MINIATURE, "device": "cpu"},
        "_meta": {"title": ""},
    }
    (old,) = server.images(graph)
    values = {"scale": 0.7, "start": 0.1, "end": 0.9, "projection": "ortho", "num_zero": 8}
    (ours,) = server.images(load_workflow(OpenPulidApply=values))
    assert np.array_equal(old, ours)


def test_server_log_has_no_errors(server) -> None:
    log = Path(server.directory / "server.log").read_text()
    assert "IMPORT FAILED: " not in log or "openpulid" not in log.split("IMPORT FAILED")[1]
