"""Identities: stored once, named in requests, and nobody else's."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from openpulid.identity.identity import Identity
from tests.service.api.conftest import PHOTO, PORTRAIT, check_problem, wait_for_end

OPTIONS = {"prompt": "portrait", "num_steps": 2, "seed": 8}


@pytest.fixture(scope="module")
def identity(anna: httpx.Client) -> dict[str, str]:
    with PORTRAIT.open("rb") as file:
        response = anna.post("/v1/identities", files={"image": file})
    assert response.status_code == 201
    return response.json()


def generate(client: httpx.Client, person: dict[str, object]) -> np.ndarray:
    body = {**OPTIONS, "people": [person], "response_format": "url"}
    response = client.post("/v1/images/generations", json=body)
    url = response.raise_for_status().json()["data"][0]["url"]
    return np.asarray(Image.open(BytesIO(client.get(url).content)))


def test_identity_replaces_its_images(anna: httpx.Client, identity: dict[str, str]) -> None:
    assert anna.get(f"/v1/identities/{identity['id']}").json() == identity
    assert identity["created_at"] < identity["expires_at"]
    named = generate(anna, {"identity": identity["id"]})
    assert (named == generate(anna, {"images": [PHOTO]})).all()
    assert (named != generate(anna, {"identity": identity["id"], "scale": 0})).any()


def test_file_can_be_downloaded_and_uploaded(
    anna: httpx.Client, ben: httpx.Client, identity: dict[str, str], tmp_path: Path
) -> None:
    content = anna.get(identity["url"]).content
    file = tmp_path / "anna.safetensors"
    file.write_bytes(content)
    response = ben.post("/v1/identities", files={"identity": content})
    other = response.raise_for_status().json()
    assert other["id"] != identity["id"]
    again = tmp_path / "again.safetensors"
    again.write_bytes(ben.get(other["url"]).content)
    assert Identity.load(again).fingerprint == Identity.load(file).fingerprint


def test_identity_of_another_key_does_not_exist(
    anna: httpx.Client, ben: httpx.Client, identity: dict[str, str]
) -> None:
    path = f"/v1/identities/{identity['id']}"
    for answer in (ben.get(path), ben.get(f"{path}/file"), ben.delete(path)):
        check_problem(answer, 404, "there is no such identity")
    body = {**OPTIONS, "people": [{"identity": identity["id"]}]}
    problem = check_problem(ben.post("/v1/jobs", json=body), 400, "there is no identity")
    assert problem["fields"] == ["people.0.identity"]
    assert anna.get(path).status_code == 200


def test_deleted_identity_is_gone_but_its_jobs_go_on(anna: httpx.Client) -> None:
    identity = anna.post("/v1/identities", json={"image": [PHOTO]}).json()
    body = {**OPTIONS, "people": [{"identity": identity["id"]}]}
    job = anna.post("/v1/jobs", json=body).json()
    response = anna.delete(f"/v1/identities/{identity['id']}")
    assert (response.status_code, response.content) == (204, b"")
    check_problem(anna.get(f"/v1/identities/{identity['id']}"), 404)
    assert wait_for_end(anna, job)["status"] == "completed"


def test_mistakes(anna: httpx.Client) -> None:
    gray = BytesIO()
    Image.new("RGB", (96, 96), "gray").save(gray, "PNG")
    response = anna.post("/v1/identities", files={"image": gray.getvalue()})
    check_problem(response, 400, "people.0.images.0: no face detected")
    for body, sentence in (
        ({}, "image is missing"),
        ({"image": [PHOTO], "prompt": "portrait"}, "prompt does not belong to an identity"),
        ({"image": [PHOTO], "identity": PHOTO}, "provide either images or an identity file"),
        ({"image": [PHOTO], "face_index": 3}, "face"),
        ({"image": ["/etc/passwd"]}, "image must be a data: URL"),
        ({"identity": PHOTO}, "people.0.identity is not an identity file"),
        ({"image": [PHOTO], "model": "sdxl"}, "there is no model 'sdxl'"),
    ):
        check_problem(anna.post("/v1/identities", json=body), 400, sentence)
