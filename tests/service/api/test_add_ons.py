"""LoRAs, embeddings, an initial image and a mask: files of other kinds than reference images."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import openpulid as pulid
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.studio import Studio
from tests.pipelines.test_loras import save_lora
from tests.service.api.conftest import PORTRAIT, wait_for_end

OPTIONS: dict[str, Any] = {"prompt": "portrait", "num_inference_steps": 3, "seed": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, backend: object) -> Path:
    folder = tmp_path_factory.mktemp("files")
    pipe = pulid.load("mini").pipe
    widths = (pipe.text_encoder.config.hidden_size, pipe.text_encoder_2.config.hidden_size)
    save_file(
        {f"clip_{name}": torch.ones(1, width) for name, width in zip("lg", widths, strict=True)},
        folder / "sks.safetensors",
    )
    save_lora(pipe, folder).rename(folder / "lora.safetensors")
    mask = Image.new("L", (96, 96), 0)
    mask.paste(255, (0, 0, 96, 48))
    mask.save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module")
def studio(folder: Path) -> Studio:
    return pulid.load("mini")


def check_same_image(client: httpx.Client, studio: Studio, fields: dict[str, Any]) -> None:
    """Check that the service gives the image of these fields, and that they have an effect."""

    def to_url(value: Any) -> Any:
        if isinstance(value, Path):
            return f"data:;base64,{base64.b64encode(value.read_bytes()).decode()}"
        if isinstance(value, dict):
            return {name: to_url(entry) for name, entry in value.items()}
        return [to_url(entry) for entry in value] if isinstance(value, list) else value

    body = OPTIONS | to_url(fields)
    answer = client.post("/v1/images/generations", json=body)
    content = base64.b64decode(answer.raise_for_status().json()["data"][0]["b64_json"])
    image = np.asarray(Image.open(BytesIO(content)))
    (expected,) = studio.generate(GenerationRequest.model_validate(OPTIONS | fields)).images
    (plain,) = studio.generate(GenerationRequest.model_validate(OPTIONS)).images
    assert (image == np.asarray(expected)).all()
    assert (image != np.asarray(plain)).any()


def test_lora(client: httpx.Client, studio: Studio, folder: Path) -> None:
    loras = [{"model": folder / "lora.safetensors", "scale": 0.7}]
    check_same_image(client, studio, {"loras": loras})


def test_embedding(client: httpx.Client, studio: Studio, folder: Path) -> None:
    embeddings = [{"file": folder / "sks.safetensors", "token": "sks"}]
    check_same_image(client, studio, {"prompt": "portrait, sks", "embeddings": embeddings})


def test_word_of_an_embedding_is_the_name_of_its_file(
    client: httpx.Client, studio: Studio, folder: Path
) -> None:
    fields = {"prompt": "portrait, sks", "num_inference_steps": 3, "seed": 2}
    embeddings = [{"file": folder / "sks.safetensors", "token": "sks"}]
    request = GenerationRequest.model_validate(fields | {"embeddings": embeddings})
    (expected,) = studio.generate(request).images
    content = (folder / "sks.safetensors").read_bytes()
    form = {"prompt": "portrait, sks", "num_inference_steps": "3", "seed": "2"}
    form["embeddings"] = '[{"file": "sks.safetensors"}]'
    answer = client.post("/v1/jobs", data=form, files={"sks.safetensors": content})
    job = wait_for_end(client, answer.raise_for_status().json())
    content = client.get(f"/v1/jobs/{job['id']}/images/0").raise_for_status().content
    assert (np.asarray(Image.open(BytesIO(content))) == np.asarray(expected)).all()
    body = fields | {"embeddings": [{"file": "data:;base64,AAAA"}]}
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 400 and "embeddings.token is missing" in answer.text


def test_inpainting(client: httpx.Client, studio: Studio, folder: Path) -> None:
    init_image = {"image": PORTRAIT, "mask": folder / "mask.png", "strength": 0.9}
    check_same_image(client, studio, {"init_image": init_image})


def test_several_people(client: httpx.Client, studio: Studio, folder: Path) -> None:
    people = [
        {"images": [PORTRAIT], "mask": folder / "mask.png"},
        {"images": [PORTRAIT], "box": [0, 0.5, 1, 1], "scale": 0.3},
    ]
    check_same_image(client, studio, {"people": people})
