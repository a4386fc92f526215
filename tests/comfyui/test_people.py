"""Several people as inputs of one node."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.comfyui.test_server import load_workflow
from tests.support import comfyui
from tests.support.comfyui import requires_comfyui
from tests.support.comfyui_server import Graph, Server, both_packs, serve

pytestmark = requires_comfyui


def has_growing_inputs() -> bool:
    comfyui.import_comfyui()
    from comfy_api.latest import io

    return hasattr(io, "Autogrow")


def test_nodes_are_offered_where_inputs_can_grow() -> None:
    comfyui.import_comfyui()
    extension = comfyui.import_pack("extension").OpenPulidExtension()
    nodes = {node.__name__ for node in asyncio.run(extension.get_node_list())}
    assert "ApplyPulid" in nodes
    expected = {"DescribePerson", "ApplyPulidToPeople"} if has_growing_inputs() else set()
    assert nodes & {"DescribePerson", "ApplyPulidToPeople"} == expected


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    if not has_growing_inputs():
        pytest.skip("this version of ComfyUI has no inputs that grow")
    with serve(tmp_path_factory.mktemp("people"), *both_packs()) as server:
        for name, columns in {"left": slice(0, 48), "right": slice(48, 96)}.items():
            mask = np.zeros((96, 96, 3), np.uint8)
            mask[:, columns] = 255
            Image.fromarray(mask).save(server.directory / "input" / f"{name}.png")
        yield server


def join_people(graph: Graph, **inputs: Any) -> Graph:
    """Replace two Apply PuLID nodes in a row by one for people.

    Args:
        graph: the workflow.
        inputs: values of the node for people.
    """
    first, second = (key for key, node in graph.items() if node["class_type"] == "OpenPulidApply")
    shared = dict(graph[first]["inputs"])
    people = []
    for key in (first, second):
        values = {name: graph[key]["inputs"][name] for name in ("identity", "scale", "mask")}
        people.append({"class_type": "OpenPulidPerson", "inputs": values})
    for name in ("identity", "scale", "mask"):
        del shared[name]
    graph["100"], graph["101"] = people
    shared.update({"people.person_0": ["100", 0], "people.person_1": ["101", 0]}, **inputs)
    graph[second] = {"class_type": "OpenPulidApplyPeople", "inputs": shared}
    del graph[first]
    return graph


def test_people_equal_repeated_application(server) -> None:
    (repeated,) = server.images(load_workflow("sdxl-two-people"))
    (joined,) = server.images(join_people(load_workflow("sdxl-two-people")))
    assert np.array_equal(joined, repeated)
    alone = join_people(load_workflow("sdxl-two-people"))
    for node in alone.values():
        node["inputs"].pop("people.person_1", None)
    (one,) = server.images(alone)
    assert not np.array_equal(one, joined)


@pytest.mark.parametrize(
    ("values", "inputs", "message"),
    [
        ({"scale": -1.0}, {}, "scale must be a number of 0 or more"),
        ({}, {"start": 0.6, "end": 0.5}, "start 0.6 is not before end 0.5"),
        ({}, {"people.person_0": None}, "people.person_0"),
    ],
)
def test_bad_values_are_refused_before_the_run(server, values, inputs, message) -> None:
    graph = join_people(load_workflow("sdxl-two-people"), **inputs)
    graph["100"]["inputs"].update(values)
    for node in graph.values():
        node["inputs"] = {
            name: value for name, value in node["inputs"].items() if value is not None
        }
    status, answer = server.queue(graph)
    assert status == 400
    assert message in json.dumps(answer["node_errors"])
