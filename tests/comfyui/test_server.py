"""The nodes in ComfyUI's own server, over HTTP: what they list, refuse, save and show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.comfyui import requires_comfyui
from tests.support.comfyui_workflows import load_workflow

pytestmark = requires_comfyui

NODES = {
    "OpenPulidLoad",
    "OpenPulidApply",
    "OpenPulidApplyImages",
    "OpenPulidLoadFaceModels",
    "OpenPulidIdentity",
    "OpenPulidLoadIdentity",
    "OpenPulidSaveIdentity",
    "OpenPulidSimilarity",
    "OpenPulidFacePreview",
    "OpenPulidLoadMethod",
    "OpenPulidLoadMethodFaceModels",
    "OpenPulidApplyMethod",
    "OpenPulidApplyIdentityNet",
    "OpenPulidPhotoMakerPrompt",
}
GROWING_NODES = {"OpenPulidPerson", "OpenPulidApplyPeople"}
"""Their list of inputs grows, which ComfyUI has since December 2025."""


def test_all_nodes_are_listed(server) -> None:
    nodes = server.get("/object_info")
    listed = {name for name in nodes if name.startswith("OpenPulid")}
    assert listed - GROWING_NODES == NODES
    for name in listed:
        assert nodes[name]["category"] == "openpulid" and nodes[name]["description"]


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("OpenPulidApply", {"scale": -1.0}, "scale must be a number of 0 or more"),
        ("OpenPulidApply", {"start": 2.0}, "start and end must be fractions of the schedule"),
        ("OpenPulidApply", {"start": 0.6, "end": 0.5}, "start 0.6 is not before end 0.5"),
        ("OpenPulidApply", {"num_zero": -3}, "num_zero must be an integer"),
        ("OpenPulidApply", {"scale": 50.0}, "scale must be at most 5; got 50."),
        ("OpenPulidApply", {"num_zero": 100_000}, "num_zero must be at most 1000; got 100000."),
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
    assert "no face detected in its 96 x 96 pixels (at 96 pixels, in four " in message


def test_identity_is_saved_loaded_and_compared(server) -> None:
    graph = load_workflow()
    graph = {key: graph[key] for key in ("3", "4", "5")}
    graph["6"] = {
        "class_type": "OpenPulidSaveIdentity",
        "inputs": {"identity": ["5", 0], "name": "anna"},
    }
    other = server.directory / "models" / "pulid_identities" / "anna.safetensors"
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(b"another person, whom Load identity would load")
    for number in (1, 2):  # the second is a new file
        graph["5"]["inputs"]["fusion"] = ("concat", "mean")[number - 1]
        assert server.run(graph)["status"]["status_str"] == "success"
    folder = server.directory / "output" / "identities"
    assert {path.name for path in folder.iterdir()} == {
        "anna_2.safetensors",
        "anna_3.safetensors",
    }
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    compared = {
        key: graph[key] for key in ("3", "4", "5")
    } | {
        "7": {"class_type": "OpenPulidLoadIdentity", "inputs": {"file": "anna_2.safetensors"}},
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


def test_server_log_has_no_errors(server) -> None:
    log = Path(server.directory / "server.log").read_text()
    assert "IMPORT FAILED: " not in log or "openpulid" not in log.split("IMPORT FAILED")[1]
