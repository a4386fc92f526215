"""The files of the node pack: its example workflows, and the rules of ComfyUI's registry."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from PIL import Image

import openpulid as pulid
from openpulid.io.hub import WEIGHTS
from openpulid.pipelines.presets import sdxl

PACK = Path(__file__).parents[2] / "comfyui"
SOURCES = sorted(PACK.rglob("*.py"))
WORKFLOWS = sorted((PACK / "example_workflows").glob("*.json"))
NOTE = "MarkdownNote"
"""A node of the page, which the API does not have."""

by_stem = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@by_stem
def test_both_formats_of_a_workflow_are_the_same(path) -> None:
    page = json.loads(path.read_text("utf-8"))
    graph = json.loads((path.parent / "api" / path.name).read_text("utf-8"))
    nodes = [node for node in page["nodes"] if node["type"] != NOTE]
    assert {str(node["id"]): node["type"] for node in nodes} == {
        key: node["class_type"] for key, node in graph.items()
    }
    outputs = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    for node in nodes:
        inputs = graph[str(node["id"])]["inputs"]
        links = {x["name"]: outputs[x["link"]] for x in node["inputs"] if x["link"] is not None}
        assert links == {name: value for name, value in inputs.items() if isinstance(value, list)}
        values = [value for value in inputs.values() if not isinstance(value, list)]
        remaining = [value for value in node["widgets_values"] if value in values]
        assert remaining[: len(values)] == values


@by_stem
def test_nodes_of_a_workflow_do_not_overlap(path) -> None:
    title = 30
    boxes = []
    for node in json.loads(path.read_text("utf-8"))["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((x, y - title, x + width, y + height))
    for k, (left, top, right, bottom) in enumerate(boxes):
        for other_left, other_top, other_right, other_bottom in boxes[:k]:
            is_beside = left >= other_right or right <= other_left
            assert is_beside or top >= other_bottom or bottom <= other_top


def test_thumbnails_are_small_and_belong_to_a_workflow() -> None:
    thumbnails = sorted((PACK / "example_workflows").glob("*.jpg"))
    assert len(thumbnails) > 1
    for path in thumbnails:
        assert path.with_suffix(".json") in WORKFLOWS
        assert path.stat().st_size < 60_000
        with Image.open(path) as image:
            assert image.format == "JPEG" and image.size == (480, 480)


@by_stem
def test_note_downloads_the_face_models_alone(path) -> None:
    """Base models and adapters of a preset have tens of gigabytes, and ComfyUI's own folders."""
    notes = [x for x in json.loads(path.read_text("utf-8"))["nodes"] if x["type"] == NOTE]
    (command,) = re.findall(r"pulid weights get ([\w -]+)\*\*", json.dumps(notes))
    models = sdxl().models
    roles = (models.detector, models.recognition, models.face_parsing, models.vision_encoder)
    assert command.split() == list(roles)
    assert sum(WEIGHTS[name].megabytes for name in roles) < 1200


def walk(kind: type[ast.AST]) -> Iterator[tuple[str, ast.AST]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, kind):
                yield path.name, node


def test_pack_runs_no_text_as_code() -> None:
    forbidden = {"eval", "exec", "compile", "__import__"}
    assert not [(file, node.id) for file, node in walk(ast.Name) if node.id in forbidden]


def test_pack_starts_no_programs_and_installs_nothing() -> None:
    forbidden = {"subprocess", "pip", "multiprocessing", "ctypes", "runpy", "importlib"}
    modules = [(file, alias.name) for file, node in walk(ast.Import) for alias in node.names]
    modules += [(file, node.module or "") for file, node in walk(ast.ImportFrom)]
    assert not [(file, name) for file, name in modules if name.split(".")[0] in forbidden]
    calls = {"system", "popen", "spawnv", "spawnl", "execv", "execl"}
    assert not [(file, node.attr) for file, node in walk(ast.Attribute) if node.attr in calls]


def test_node_ids_are_unique_and_have_the_prefix() -> None:
    ids = [
        keyword.value.value
        for _, node in walk(ast.Call)
        for keyword in node.keywords
        if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant)
    ]
    assert len(ids) > 8 and len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"OpenPulid[A-Z]\w+", name) for name in ids)


def test_project_file_is_complete() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    file = tomllib.loads((PACK / "pyproject.toml").read_text("utf-8"))
    project, comfy = file["project"], file["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,99}", project["name"])
    assert project["description"] and len(Version(project["version"]).release) == 3
    assert (PACK / project["license"]["file"]).is_file()
    assert project["urls"]["Repository"].startswith("https://github.com/")
    assert comfy["PublisherId"] and comfy["DisplayName"]
    assert Version("0.3.64") in SpecifierSet(comfy["requires-comfyui"])
    package = tomllib.loads((PACK.parent / "pyproject.toml").read_text("utf-8"))["project"]
    systems = [x for x in project["classifiers"] if x.startswith("Operating System ::")]
    assert systems and set(systems) <= set(package["classifiers"])
    # ComfyUI's manager installs what requirements.txt has.
    requirements = (PACK / "requirements.txt").read_text("utf-8").splitlines()
    assert requirements == project["dependencies"]
    (requirement,) = map(Requirement, requirements)
    assert requirement.name == "openpulid"
    assert pulid.__version__ in requirement.specifier
