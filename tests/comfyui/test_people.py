"""Several people as inputs of one node."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

from tests.support import comfyui
from tests.support.comfyui import requires_comfyui
from tests.support.comfyui_server import Graph, Server
from tests.support.comfyui_workflows import load_workflow

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
def growing(server) -> Server:
    """The server, if its version has inputs that grow."""
    if not has_growing_inputs():
        pytest.skip("this version of ComfyUI has no inputs that grow")
    return server


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


def test_people_equal_repeated_application(growing) -> None:
    (repeated,) = growing.images(load_workflow("sdxl-two-people"))
    (joined,) = growing.images(join_people(load_workflow("sdxl-two-people")))
    assert np.array_equal(joined, repeated)
    alone = join_people(load_workflow("sdxl-two-people"))
    for node in alone.values():
        node["inputs"].pop("people.person_1", None)
    (one,) = growing.images(alone)
    assert not np.array_equal(one, joined)


@pytest.mark.parametrize(
    ("values", "inputs", "message"),
    [
        ({"scale": -1.0}, {}, "scale must be a number of 0 or more"),
        ({}, {"start": 0.6, "end": 0.5}, "start 0.6 is not before end 0.5"),
        ({}, {"people.person_0": None}, "people.person_0"),
    ],
)
def test_bad_values_are_refused_before_the_run(growing, values, inputs, message) -> None:
    graph = join_people(load_workflow("sdxl-two-people"), **inputs)
    graph["100"]["inputs"].update(values)
    for node in graph.values():
        node["inputs"] = {
            name: value for name, value in node["inputs"].items() if value is not None
        }
    status, answer = growing.queue(graph)
    assert status == 400
    assert message in json.dumps(answer["node_errors"])
