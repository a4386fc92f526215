"""The official client of OpenAI, unchanged, against the service."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import openpulid as pulid
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Person
from openpulid.pipelines.studio import Studio
from tests.service.api.conftest import ANNA, PORTRAIT

openai = pytest.importorskip("openai")

STEPS = 3
PROMPT = "portrait, film noir"


@pytest.fixture(scope="module")
def openai_client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def studio() -> Studio:
    return pulid.load("mini")


def decode(image: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(image))))


def generate(studio: Studio, **fields: object) -> list[np.ndarray]:
    request = GenerationRequest.model_validate(
        {"prompt": PROMPT, "num_inference_steps": STEPS, **fields}
    )
    return [np.asarray(image) for image in studio.generate(request).images]


def test_generate_returns_the_images_of_the_same_seeds(
    openai_client: openai.OpenAI, studio: Studio
) -> None:
    answer = openai_client.images.generate(
        model="mini",
        prompt=PROMPT,
        n=2,
        size="96x96",
        quality="high",
        user="somebody",
        extra_body={"seed": 11, "num_steps": STEPS},
    )
    assert [image.model_extra["seed"] for image in answer.data] == [11, 12]
    expected = generate(studio, seed=11, num_images=2)
    for image, alone in zip(answer.data, expected, strict=True):
        # a batch sums in another order
        assert np.abs(decode(image.b64_json).astype(int) - alone.astype(int)).max() <= 2
