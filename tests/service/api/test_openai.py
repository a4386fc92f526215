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
from openpulid.pipelines.studio import Studio
from openpulid.service.api.backend import Backend
from tests.service.api.conftest import ANNA, PHOTO, PORTRAIT, limited
from tests.service.api.test_faults import data_url

openai = pytest.importorskip("openai")

STEPS = 3
PROMPT = "portrait, film noir"
OPTIONS = {"seed": 11, "num_steps": STEPS}


@pytest.fixture(scope="module")
def api(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as api:
        yield api


@pytest.fixture(scope="module")
def studio() -> Studio:
    return pulid.load("mini")


def decode(image: str) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(base64.b64decode(image)))).astype(int)


def generate(studio: Studio, **fields: object) -> list[np.ndarray]:
    """Generate images as `pulid generate` does."""
    request = GenerationRequest.model_validate(
        {"prompt": PROMPT, "num_inference_steps": STEPS, "seed": 11, **fields}
    )
    return [np.asarray(image).astype(int) for image in studio.generate(request).images]


def test_image_is_that_of_the_same_seed(api: openai.OpenAI, studio: Studio, tmp_path: Path) -> None:
    answer = api.images.generate(model="mini", prompt=PROMPT, extra_body=OPTIONS)
    (expected,) = generate(studio)
    assert (decode(answer.data[0].b64_json) == expected).all()
    file = tmp_path / "image.png"
    file.write_bytes(base64.b64decode(answer.data[0].b64_json))
    (again,) = studio.generate(Provenance.read(file).restore()).images
    assert (np.asarray(again) == expected).all()


def test_several_images_are_those_of_the_next_seeds(api: openai.OpenAI, studio: Studio) -> None:
    answer = api.images.generate(
        prompt=PROMPT, n=2, size="96x96", quality="high", user="somebody", extra_body=OPTIONS
    )
    assert [image.model_extra["seed"] for image in answer.data] == [11, 12]
    expected = generate(studio, num_images=2)
    for image, alone in zip(answer.data, expected, strict=True):
        # a batch sums in another order
        assert np.abs(decode(image.b64_json) - alone).max() <= 2


def draw_masks(folder: Path) -> None:
    """Draw a mask of the left half as OpenAI's API has it, and as `pulid generate` has it."""
    mask = Image.new("RGBA", (96, 96), "red")
    mask.paste((0, 0, 0, 0), (0, 0, 48, 96))
    mask.save(folder / "mask.png")
    white = Image.new("L", (96, 96), 0)
    white.paste(255, (0, 0, 48, 96))
    white.save(folder / "white.png")


def test_edit_shows_the_person_where_the_mask_is_transparent(
    api: openai.OpenAI, studio: Studio, tmp_path: Path
) -> None:
    draw_masks(tmp_path)
    person = {"images": [str(PORTRAIT)], "mask": str(tmp_path / "white.png")}
    with PORTRAIT.open("rb") as image, (tmp_path / "mask.png").open("rb") as file:
        answer = api.images.edit(image=image, mask=file, prompt=PROMPT, extra_body=OPTIONS)
    edited = decode(answer.data[0].b64_json)
    assert (edited == generate(studio, people=[person])[0]).all()
    assert np.abs(edited - generate(studio)[0]).max() > 10


@pytest.mark.parametrize("way", ["form file", "form text", "json"])
def test_mask_means_the_same_however_it_is_sent(
    anna: httpx.Client, studio: Studio, tmp_path: Path, way: str
) -> None:
    draw_masks(tmp_path)
    content = (tmp_path / "mask.png").read_bytes()
    fields = {**OPTIONS, "prompt": PROMPT}
    if way == "json":
        body = {**fields, "image": PHOTO, "mask": data_url(content)}
        response = anna.post("/v1/images/edits", json=body)
    else:
        files = {"image": PORTRAIT.read_bytes()}
        if way == "form text":
            fields["mask"] = data_url(content)
        else:
            files["mask"] = content
        response = anna.post("/v1/images/edits", data=fields, files=files)
    edited = decode(response.raise_for_status().json()["data"][0]["b64_json"])
    person = {"images": [str(PORTRAIT)], "mask": str(tmp_path / "white.png")}
    assert (edited == generate(studio, people=[person])[0]).all()


def test_edit_takes_several_images_and_nested_fields(api: openai.OpenAI, studio: Studio) -> None:
    with PORTRAIT.open("rb") as one, PORTRAIT.open("rb") as other:
        answer = api.images.edit(
            image=[one, other],
            prompt=PROMPT,
            extra_body={**OPTIONS, "identity": {"scale": 0.4, "start": 0.2}},
        )
    people = [{"images": [str(PORTRAIT)] * 2}]
    expected = generate(studio, people=people, identity={"scale": 0.4, "start": 0.2})
    assert (decode(answer.data[0].b64_json) == expected[0]).all()


def test_formats(api: openai.OpenAI) -> None:
    sizes = {}
    for quality in (95, 10):
        answer = api.images.generate(
            prompt=PROMPT,
            output_format="jpeg",
            output_compression=quality,
            extra_body={**OPTIONS, "num_steps": 1},
        )
        content = base64.b64decode(answer.data[0].b64_json)
        image = Image.open(BytesIO(content))
        assert image.format == "JPEG"
        assert b"trainedAlgorithmicMedia" in content  # its origin, as XMP
        sizes[quality] = len(content)
    assert sizes[10] < sizes[95]


def test_address_of_an_image(api: openai.OpenAI) -> None:
    answer = api.images.generate(
        prompt=PROMPT, response_format="url", output_format="webp", extra_body=OPTIONS
    )
    url = answer.data[0].url
    assert answer.data[0].b64_json is None
    response = api._client.get(url)
    assert response.headers["content-type"] == "image/webp"
    assert Image.open(BytesIO(response.content)).format == "WEBP"


def test_stream(api: openai.OpenAI, studio: Studio) -> None:
    stream = api.images.generate(
        prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 11, "num_steps": 30}
    )
    events = list(stream)
    types = [event.type for event in events]
    assert types[-1] == "image_generation.completed"
    assert set(types[:-1]) == {"image_generation.partial_image"}
    assert events[0].partial_image_index == 0
    assert decode(events[0].b64_json).ndim == 3
    (expected,) = generate(studio, num_inference_steps=30)
    assert (decode(events[-1].b64_json) == expected).all()


def test_stream_of_an_edit_fails_with_the_sentence(api: openai.OpenAI) -> None:
    gray = BytesIO()
    Image.new("RGB", (96, 96), "gray").save(gray, "PNG")
    with pytest.raises(openai.APIError, match=r"people\.0\.images\.0: no face detected"):
        list(api.images.edit(image=gray.getvalue(), prompt=PROMPT, stream=True))


def test_models(api: openai.OpenAI) -> None:
    models = api.models.list().data
    assert [model.id for model in models] == ["mini", "mini-lightning"]
    model = api.models.retrieve("mini-lightning")
    methods = {method["name"]: method for method in model.model_extra["methods"]}
    assert next(iter(methods)) == "pulid"
    assert "faceid" in methods
    assert methods["pulid"]["defaults"]["num_inference_steps"] == 4
    assert model.model_extra["size"] == {"native": 96, "multiple": 8, "min": 16, "max": 160}
    with pytest.raises(openai.NotFoundError, match="choose one of mini, mini-lightning"):
        api.models.retrieve("dall-e-3")


def test_errors_are_those_of_the_client(
    api: openai.OpenAI, keyed_url: str, backend: Backend
) -> None:
    with pytest.raises(openai.BadRequestError, match="the model does not know 'xyzzy'") as caught:
        api.images.generate(prompt="portrait xyzzy")
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match=r"there is no model 'mni' .*'mini'") as caught:
        api.images.generate(model="mni", prompt=PROMPT)
    assert caught.value.param == "model"
    other = openai.OpenAI(base_url=f"{keyed_url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="Authorization: Bearer KEY"):
        other.models.list()
    assert other.with_options(api_key=ANNA).models.list().data
    with limited(backend, rate="1/hour") as client:
        other = api.with_options(base_url=f"{client.base_url}/v1")
        other.images.generate(prompt=PROMPT, extra_body={"num_steps": 1})
        with pytest.raises(openai.RateLimitError, match="try again in") as limit:
            other.images.generate(prompt=PROMPT)
    # an hour after the first, even where a new hour of the clock begins in between
    assert int(limit.value.response.headers["retry-after"]) > 3000
