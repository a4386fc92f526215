"""Several people over HTTP with FastComposer, by their words."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from openpulid.pipelines.loading import load
from openpulid.pipelines.request import ModelSelection
from openpulid.service.api.app import create_app
from openpulid.service.config import Limits, ServiceConfig
from openpulid.service.server import open_backend
from tests.service.api.conftest import check_problem, serve
from tests.support.composer_files import TWO_PEOPLE, draw_person, link_miniature

SEED, STEPS = 2, 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_miniature(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def client(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Client of a service whose only preset has FastComposer's file."""
    folder = tmp_path_factory.mktemp("service") / "data"
    config = ServiceConfig(folder, (ModelSelection(preset=str(weights)),), Limits())
    with (
        open_backend(config) as backend,
        serve(create_app(backend)) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        yield client


def add_person(client: httpx.Client, seed: int) -> dict[str, str]:
    """Store the identity of a synthetic person."""
    file = BytesIO()
    draw_person(seed).save(file, "png")
    form = {"method": "fastcomposer"}
    answer = client.post("/v1/identities", data=form, files={"image": file.getvalue()})
    return {"identity": answer.raise_for_status().json()["id"]}


def test_people_go_to_their_words(client: httpx.Client, weights: Path) -> None:
    people = [add_person(client, seed) for seed in (3, 4)]
    body: dict[str, Any] = {"prompt": TWO_PEOPLE, "seed": SEED, "num_steps": STEPS}
    body |= {"method": "fastcomposer", "identity": {"start": 0}}

    def generate(people: list[dict[str, str]]) -> np.ndarray:
        answer = client.post("/v1/images/generations", json={**body, "people": people})
        content = b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])
        return np.asarray(Image.open(BytesIO(content))).astype(int)

    studio = load(weights, "cpu", method="fastcomposer")
    identities = [(studio.identify(draw_person(seed)), None) for seed in (3, 4)]
    expected = studio.generate(
        TWO_PEOPLE, identities, seed=SEED, num_inference_steps=STEPS, start=0.0
    )
    image = generate(people)
    assert np.abs(image - np.asarray(expected.images[0])).max() <= 2
    assert np.abs(generate(people[::-1]) - image).max() > 2

    for changes, sentence in (
        (
            {"prompt": "portrait of a person"},
            "prompt has 1 word for 2 people; write one",
        ),
        ({"method": None}, "each of several people needs people.mask or people.box"),
        ({"people": [people[0], {**people[1], "scale": 0.5}]}, "people.scale 0.5 is not that of"),
    ):
        changed = {**body, "people": people, **changes}
        check_problem(client.post("/v1/images/generations", json=changed), 400, sentence)
    both = {"people": people, "method": "fastcomposer"}
    refused = client.post("/v1/identities", json=both)
    check_problem(refused, 400, "an identity is that of one person, and people has 2; send a")
