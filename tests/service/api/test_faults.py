"""Mistakes of clients: one sentence each, status 4xx, and the service goes on."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from openpulid.errors import OptionError, StoreError, explain_out_of_memory
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_part import RequestPart
from openpulid.service.api.backend import Backend
from openpulid.service.api.fields import ALIASES
from openpulid.service.api.files import NAME_FIELDS, UPLOADED_FIELDS
from openpulid.service.api.problems import to_problem
from tests.service.api.conftest import PHOTO, PORTRAIT, check_problem, limited
from tests.support.image_files import IMAGES

ROUTES = ("/v1/images/generations", "/v1/jobs")
JSON = {"content-type": "application/json"}


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


@pytest.mark.parametrize("kind", ["store", "memory"])
def test_faults_of_the_server_can_be_tried_again(kind: str) -> None:
    if kind == "store":
        problem = to_problem(StoreError("the disk of the service is full; try again later."))
        assert problem.detail == "the disk of the service is full; try again later."
    else:
        with pytest.raises(OptionError) as raised, explain_out_of_memory():
            raise RuntimeError("CUDA out of memory")
        problem = to_problem(raised.value)
    assert problem.status == 503 and problem.headers == {"Retry-After": "60"}


BODIES: list[tuple[dict[str, Any], str]] = [
    ({}, "prompt is missing."),
    ({"prompt": " "}, "prompt must not be empty."),
    ({"prompt": 5}, "prompt must be text, got 5."),
    ({"prompt": "portrait \ud800"}, "prompt is not valid UTF-8 text."),
    ({"prompt": "a zebra"}, "the model does not know 'zebra'"),
    ({"prompt": "portrait", "num_step": 3}, "there is no option num_step"),
    ({"prompt": "portrait", "num_steps": 0}, "num_steps must be at least 1, got 0."),
    ({"prompt": "portrait", "num_steps": 101}, "num_steps must be at most 100 on this server"),
    ({"prompt": "portrait", "n": 17}, "n must be at most 16 on this server, got 17."),
    ({"prompt": "portrait", "n": "many"}, "n must be a whole number, got 'many'."),
    ({"prompt": "portrait", "id_weight": 9}, "id_weight must be at most 5"),
    ({"prompt": "portrait", "id_weight": 1, "identity": {"scale": 1}}, "set the same option"),
    ({"prompt": "portrait", "true_cfg": 2}, "preset 'mini' does not support: true_cfg."),
    ({"prompt": "portrait", "seed": 2**64}, "seed must be at most 18446744073709551615"),
    ({"prompt": "portrait", "size": "big"}, "size: expected WIDTHxHEIGHT in pixels, got 'big'."),
    ({"prompt": "portrait", "size": "100x96"}, "must be multiples of 8"),
    ({"prompt": "portrait", "size": "96x96", "width": 96}, "set either size, or width and height."),
    ({"prompt": "portrait", "model": "sdxl"}, "there is no model 'sdxl' on this server"),
    ({"prompt": "portrait", "model": {"base": "/etc"}}, "an object with preset and method"),
    ({"prompt": "portrait", "model": {"preset": []}}, "preset must be text"),
    ({"prompt": "portrait", "method": "instant"}, "there is no method 'instant' for 'mini'"),
    ({"prompt": "portrait", "resolved": True}, "resolved is set by the service; leave it out."),
    ({"prompt": "portrait", "people": 3}, "people must be a list, got 3."),
    ({"prompt": "portrait", "people": [{}]}, "a person needs images or an identity file."),
    ({"prompt": "portrait", "people": [{"images": []}]}, "a person needs images"),
    ({"prompt": "portrait", "people": [{"images": ["data:x"]}]}, "is not a data: URL in base64"),
    ({"prompt": "portrait", "people": [{"images": [data_url(b"")]}]}, "is empty."),
    (
        {"prompt": "portrait", "people": [{"images": [data_url(b"GIF89a")]}]},
        "people.0.images.0: is not an image",
    ),
    (
        {"prompt": "portrait", "people": [{"identity": data_url(b"\0" * 99)}]},
        "people.0.identity is not an identity file",
    ),
    (
        {"prompt": "portrait", "people": [{"identity": "identity-" + "0" * 32}]},
        "there is no identity identity-",
    ),
    (
        {"prompt": "portrait", "people": [{"images": [PHOTO]}, {"images": [PHOTO]}]},
        "each of several people needs",
    ),
    (
        {"prompt": "portrait", "init_image": {"image": PHOTO, "strength": 0.01}},
        "runs none of the 20 steps",
    ),
    (
        {
            "prompt": "portrait",
            "init_image": {
                "image": PHOTO,
                "mask": data_url((IMAGES / "strip.png").read_bytes()),
                "feather": 3,
            },
        },
        "there is no option init_image.feather",
    ),
    ({"prompt": "portrait", "loras": [{"model": data_url(b"x")}]}, "loras.0.model"),
    (
        {"prompt": "portrait", "embeddings": [{"file": data_url(b"x"), "token": "sks"}]},
        "embeddings",
    ),
    (
        {"prompt": "portrait", "controls": [{"model": "control-pose", "image": PHOTO}]},
        "control-pose",
    ),
    (
        {"prompt": "portrait", "style_image": {"image": PHOTO, "model": "ip-adapter"}},
        "is not for the miniature",
    ),
    ({"prompt": [[[]]], "n": 1}, "prompt must be text"),
]


@pytest.mark.parametrize(("body", "sentence"), BODIES, ids=range(len(BODIES)))
def test_each_mistake_has_its_sentence(
    client: httpx.Client, body: dict[str, Any], sentence: str
) -> None:
    for route in ROUTES:
        check_problem(client.post(route, content=json.dumps(body), headers=JSON), 400, sentence)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"response_format": "gif"}, "response_format must be 'b64_json' or 'url', got 'gif'."),
        ({"output_format": "gif"}, "output_format must be 'png', 'jpeg' or 'webp'"),
        ({"output_compression": 50}, "output_compression has no effect on PNG images"),
        ({"output_format": "jpeg", "output_compression": 101}, "must be at most 100"),
        ({"background": "transparent"}, "background must be 'auto' or 'opaque'"),
        ({"partial_images": 4}, "partial_images must be at most 3"),
        ({"stream": "perhaps"}, "stream"),
    ],
)
def test_options_of_the_answer(
    client: httpx.Client, options: dict[str, Any], sentence: str
) -> None:
    body = {"prompt": "portrait", **options}
    check_problem(client.post("/v1/images/generations", json=body), 400, sentence)


@pytest.mark.parametrize(
    ("content", "kind", "status", "sentence"),
    [
        (b"{", "application/json", 400, "the request is not valid JSON."),
        (b"[]", "application/json", 400, "the request must be a JSON object."),
        (b"\xff", "application/json", 400, "the request is not valid JSON."),
        (b"[" * 100_000, "application/json", 400, "the request is not valid JSON."),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "application/json", 400, ""),
        (b"prompt=portrait", "application/x-www-form-urlencoded", 415, "send the request as"),
        (b"", "", 415, "send the request as application/json or multipart/form-data."),
        (b"--x", "multipart/form-data", 400, "boundary"),
        (b"garbage", "multipart/form-data; boundary=x", 400, ""),
    ],
)
def test_malformed_bodies(
    client: httpx.Client, content: bytes, kind: str, status: int, sentence: str
) -> None:
    headers = {"content-type": kind} if kind else {}
    for route in (*ROUTES, "/v1/images/edits", "/v1/identities", "/fal-ai/flux-pulid"):
        response = client.post(route, content=content, headers=headers)
        check_problem(response, status, sentence)


def list_file_fields(part: type[RequestPart], prefix: str = "") -> set[str]:
    """Return the paths of all file fields of a request, without positions."""
    fields = {f"{prefix}{name}" for name in part.files}
    for name, info in part.model_fields.items():
        for kind in RequestPart.__subclasses__():
            if kind.__name__ in str(info.annotation) and kind is not GenerationRequest:
                fields |= list_file_fields(kind, f"{prefix}{name}.")
    return fields


PATHS = (
    "/etc/passwd",
    "../../etc/passwd",
    str(PORTRAIT),
    "file:///etc/passwd",
    "http://127.0.0.1:1/a.png",
    "https://example.org/a.png",
    "guozinan/PuLID",
    "flux-dev",
    "people.0.images.0",
    "people-0-images-0",
    "data:text/plain,/etc/passwd",
    "",
)


def set_field(body: dict[str, Any], field: str, value: str) -> dict[str, Any]:
    """Set a file field in a request that is valid without it."""
    parts: dict[str, Any] = {
        "init_image": {"image": PHOTO},
        "controls": [{"model": "control-pose", "image": PHOTO}],
        "style_image": {"image": PHOTO},
        "loras": [{"model": PHOTO}],
        "embeddings": [{"file": PHOTO, "token": "word"}],
        "people": [{}],
    }
    part, name = field.split(".")
    entries = parts[part]
    entry = entries[0] if isinstance(entries, list) else entries
    entry[name] = [value] if name == "images" else value
    if field == "people.mask":
        entry["images"] = [PHOTO]
    return {**body, part: entries}


@pytest.mark.parametrize("field", [*UPLOADED_FIELDS, *NAME_FIELDS])
def test_no_path_reaches_the_file_system(client: httpx.Client, field: str) -> None:
    for path in PATHS:
        body = set_field({"prompt": "portrait"}, field, path)
        problem = check_problem(client.post("/v1/jobs", json=body), 400)
        assert "root:" not in problem["detail"]
        message = problem["detail"].lower()
        assert not any(word in message for word in ("does not exist", "cannot be read", "download"))


def test_all_file_fields_are_known() -> None:
    """A file field that a later version adds must be checked here, too."""
    known = {*UPLOADED_FIELDS, *NAME_FIELDS}
    fields = {field for field in list_file_fields(GenerationRequest) if field[:6] != "model."}
    assert fields == known


def test_only_options_of_the_route_are_suggested(client: httpx.Client) -> None:
    body = {"prompt": "portrait", "qualty": "high"}
    suggested = "there is no option qualty (did you mean 'quality'?)."
    check_problem(client.post("/v1/images/generations", json=body), 400, suggested)
    body = {"prompt": "portrait", "quality": "high"}
    problem = check_problem(client.post("/v1/jobs", json=body), 400)
    assert problem["detail"] == "there is no option quality."


@pytest.mark.parametrize("field", ["base", "adapter", "face_pack", "memory"])
def test_models_are_chosen_by_the_server(client: httpx.Client, field: str) -> None:
    body = {"prompt": "portrait", "model": {"preset": "mini", field: "/etc/passwd"}}
    check_problem(client.post("/v1/jobs", json=body), 400, "an object with preset and method")


def test_files_of_a_form(client: httpx.Client) -> None:
    photo = PORTRAIT.read_bytes()
    form = {"prompt": "portrait", "num_steps": "1", "people": '[{"images": ["anna"]}]'}
    response = client.post("/v1/jobs", data=form, files={"anna": ("../../x.png", photo)})
    assert response.status_code == 202
    response = client.post("/v1/jobs", data=form, files={"ben": photo, "anna": photo})
    check_problem(response, 400, "the uploaded file ben is not used")
    response = client.post("/v1/jobs", data={**form, "people": "[{"}, files={"anna": photo})
    check_problem(response, 400, "people must be JSON in a form.")
    response = client.post("/v1/jobs", data=form, files={"anna": b""})
    check_problem(response, 400, "people.images is empty.")


def test_unknown_resources(client: httpx.Client) -> None:
    for path in ("/v1/jobs/x", "/v1/jobs/job-" + "0" * 32, "/v1/identities/%00", "/v2", "/docs"):
        check_problem(client.get(path), 404)
    check_problem(client.put("/v1/jobs"), 405, "PUT is not possible for /v1/jobs.")


def test_limits_of_size(backend: Backend) -> None:
    photo = PORTRAIT.read_bytes()
    person = {"prompt": "portrait", "people": [{"images": [PHOTO]}]}
    with limited(backend, body_bytes=1000) as client:
        check_problem(client.post("/v1/jobs", json=person), 413, "larger than")
        chunks = iter([b'{"prompt": "', b"a" * 2000, b'"}'])
        response = client.post("/v1/jobs", content=chunks, headers=JSON)
        check_problem(response, 413, "larger than")
    with limited(backend, file_bytes=100) as client:
        check_problem(client.post("/v1/jobs", json=person), 400, "people.images is larger than")
    with limited(backend, pixels=96 * 96 - 1) as client:
        check_problem(client.post("/v1/jobs", json=person), 400, "more than the limit")
    with limited(backend, files=1) as client:
        two = {**person, "people": [{"images": [PHOTO, PHOTO]}]}
        check_problem(client.post("/v1/jobs", json=two), 400, "at most 1 files")
        files = [("image", photo), ("image", photo)]
        response = client.post("/v1/images/edits", data={"prompt": "portrait"}, files=files)
        check_problem(response, 400, "Too many files")
    with limited(backend, side=64) as client:
        check_problem(client.post("/v1/jobs", json={"prompt": "portrait", "size": "96x64"}), 400)


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_fields_of_a_request(alias: str) -> None:
    part: Any = GenerationRequest
    *parents, last = ALIASES[alias].split(".")
    for parent in parents:
        part = part.model_fields[parent].annotation
    assert last in part.model_fields
