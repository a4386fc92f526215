"""Many people at once: nobody gets the face of another.

`python benchmarks/measure_service.py identities` does the same with 1,000 requests.
"""

from __future__ import annotations

from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import httpx
import numpy as np
from PIL import Image

from openpulid.io.image_grid import to_pil
from openpulid.world import Person, Scene, render

PEOPLE = 2
REQUESTS = 12


def create_identity(client: httpx.Client, seed: int) -> str:
    file = BytesIO()
    to_pil(render([Person.from_seed(seed)], [Scene()]).image)[0].save(file, "png")
    response = client.post("/v1/identities", files={"image": file.getvalue()})
    return response.raise_for_status().json()["id"]


def generate(client: httpx.Client, identity: str, seed: int) -> np.ndarray:
    body = {"prompt": "portrait, photo", "seed": seed, "num_steps": 2}
    body |= {"people": [{"identity": identity}]}
    answer = client.post("/v1/images/generations", json=body).raise_for_status().json()
    image = Image.open(BytesIO(b64decode(answer["data"][0]["b64_json"])))
    return np.asarray(image).astype(int)


def test_every_image_is_of_its_own_person(anna: httpx.Client, ben: httpx.Client) -> None:
    identities = [
        (client, create_identity(client, 100 * number + k))
        for number, client in enumerate((anna, ben))
        for k in range(PEOPLE)
    ]
    # the same prompt and seeds for all, so that the images differ by the person alone
    alone = {
        (k, seed): generate(client, identity, seed)
        for k, (client, identity) in enumerate(identities)
        for seed in (1, 2)
    }
    jobs = [(k % len(identities), 1 + k % 2) for k in range(2 * REQUESTS)]
    with ThreadPoolExecutor(16) as pool:
        images = list(pool.map(lambda job: generate(*identities[job[0]], job[1]), jobs))
    for job, image in zip(jobs, images, strict=True):
        assert np.abs(image - alone[job]).max() <= 2
        for k in range(len(identities)):
            if k != job[0]:
                assert np.abs(image - alone[k, job[1]]).max() > 20
