"""Jobs, their events, and who may see them."""

from __future__ import annotations

import base64
import json
import logging
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timezone
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from openpulid.pipelines.request import GenerationRequest
from openpulid.service.api.answers import to_problem
from openpulid.service.api.app import create_app
from openpulid.service.api.backend import Backend
from openpulid.service.jobs import Job, JobStatus
from openpulid.service.store.jobs import JobStore, QueueLimits
from tests.service.api.conftest import (
    PHOTO,
    PORTRAIT,
    check_problem,
    limited,
    serve,
    wait_for_end,
)

LONG = {"prompt": "portrait", "num_steps": 100, "n": 4}
"""A request that takes seconds."""

SHORT = {"prompt": "portrait, smiling", "num_steps": 2, "seed": 5}


def test_job_from_acceptance_to_its_image(client: httpx.Client) -> None:
    response = client.post("/v1/jobs", json={**SHORT, "n": 2, "size": "96x104"})
    assert response.status_code == 202
    job = response.json()
    assert response.headers["location"].endswith(f"/v1/jobs/{job['id']}")
    assert (job["status"], job["images"]) in (("queued", []), ("running", []))
    job = wait_for_end(client, job)
    assert (job["status"], job["step"], job["total_steps"]) == ("completed", 4, 4)
    assert [image["seed"] for image in job["images"]] == [5, 6]
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] < job["expires_at"]
    response = client.get(job["images"][1]["url"])
    assert response.headers["content-type"] == "image/png"
    assert response.headers["cache-control"] == "no-store"
    assert Image.open(BytesIO(response.content)).size == (96, 104)
    assert client.get(job["images"][1]["url"], params={"format": "jpeg"}).content[:2] == b"\xff\xd8"
    check_problem(client.get(job["images"][1]["url"][:-1] + "2"), 404)
    check_problem(client.get(job["images"][1]["url"], params={"format": "gif"}), 400, "format")


def test_seed_is_drawn_and_returned(client: httpx.Client) -> None:
    body = {"prompt": "portrait", "num_steps": 1}
    seeds = {
        client.post("/v1/images/generations", json=body).json()["data"][0]["seed"] for _ in "ab"
    }
    assert len(seeds) == 2


def test_model_and_method(client: httpx.Client) -> None:
    person = [{"images": ["person"]}]
    form = {
        "prompt": "portrait",
        "model": "mini-lightning",
        "method": "faceid",
        "people": json.dumps(person),
        "seed": "3",
    }
    files = {"person": PORTRAIT.read_bytes()}
    job = wait_for_end(client, client.post("/v1/jobs", data=form, files=files).json())
    assert (job["status"], job["model"], job["total_steps"]) == ("completed", "mini-lightning", 4)


def read_events(response: httpx.Response) -> Iterator[tuple[str, Any]]:
    event = ""
    for line in response.iter_lines():
        name, _, value = line.partition(": ")
        if name == "event":
            event = value
        elif name == "data":
            yield event, json.loads(value)


def test_events(client: httpx.Client) -> None:
    job = client.post("/v1/jobs", json={"prompt": "portrait", "num_steps": 60}).json()
    with client.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(read_events(response))
    names = [name for name, _ in events]
    assert names[0] == "progress"
    assert names[-1] == "end"
    assert "preview" in names
    steps = [data["step"] for name, data in events if name == "progress"]
    assert steps == sorted(steps)
    preview = next(data["image"] for name, data in events if name == "preview")
    assert preview.startswith("data:image/jpeg;base64,")
    assert events[-1][1]["status"] == "completed"
    assert events[-1][1]["images"][0]["url"].startswith(str(client.base_url))


def test_cancelled_job_ends_soon(client: httpx.Client) -> None:
    job = client.post("/v1/jobs", json=LONG).json()
    while client.get(f"/v1/jobs/{job['id']}").json()["status"] == "queued":
        time.sleep(0.02)
    job = client.delete(f"/v1/jobs/{job['id']}").json()
    assert job["status"] == "cancelled"
    # the next one does not wait for the 400 steps
    begin = time.monotonic()
    client.post("/v1/images/generations", json=SHORT).raise_for_status()
    assert time.monotonic() - begin < 5
    assert (
        client.delete(f"/v1/jobs/{job['id']}").json() == client.get(f"/v1/jobs/{job['id']}").json()
    )


@pytest.mark.parametrize("is_stream", [False, True])
def test_client_that_goes_away_cancels(
    backend: Backend, url: str, is_stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    assert wait_for_empty_queue(backend)
    address = urlsplit(url)
    body = json.dumps({**LONG, "stream": is_stream})
    head = (
        f"POST /v1/images/generations HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall((head + body).encode())
        while not backend.jobs.count_unfinished():
            time.sleep(0.02)
    assert wait_for_empty_queue(backend, seconds=3)
    time.sleep(0.2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def wait_for_empty_queue(backend: Backend, seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while backend.jobs.count_unfinished():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_failed_job_names_fields(client: httpx.Client) -> None:
    gray = BytesIO()
    Image.new("RGB", (96, 96), "gray").save(gray, "PNG")
    form = {"prompt": "portrait", "people": '[{"images": ["a"]}]'}
    job = client.post("/v1/jobs", data=form, files={"a": gray.getvalue()}).json()
    job = wait_for_end(client, job)
    assert job["status"] == "failed"
    assert job["problem"]["detail"].startswith("people.0.images.0: no face detected")
    response = client.post("/v1/images/edits", data=form, files={"a": gray.getvalue()})
    check_problem(response, 400, "people.0.images.0: no face detected")


def test_jobs_of_another_key_do_not_exist(anna: httpx.Client, ben: httpx.Client) -> None:
    job = wait_for_end(anna, anna.post("/v1/jobs", json=SHORT).json())
    path = f"/v1/jobs/{job['id']}"
    for answer in (
        ben.get(path),
        ben.delete(path),
        ben.get(f"{path}/events"),
        ben.get(f"{path}/images/0"),
    ):
        problem = check_problem(answer, 404)
        missing = ben.get("/v1/jobs/job-" + "0" * 32).json()
        assert problem == missing  # not even that it exists
    assert anna.get(f"{path}/images/0").status_code == 200


def test_queue_limit(backend: Backend) -> None:
    store = JobStore(backend.jobs._database, backend.config.data, QueueLimits(jobs_per_owner=1))
    with serve(create_app(replace(backend, jobs=store))) as url:
        first = httpx.post(f"{url}/v1/jobs", json=LONG).json()
        response = httpx.post(f"{url}/v1/jobs", json=SHORT)
        check_problem(response, 429, "1 jobs of this key wait already; try again in 5 s.")
        assert response.headers["retry-after"] == "5"
        httpx.delete(f"{url}/v1/jobs/{first['id']}")


def test_rate_limit(backend: Backend) -> None:
    with limited(backend, rate="2/minute") as client:
        for _ in range(2):
            client.post("/v1/jobs", json={**SHORT, "num_steps": 1}).raise_for_status()
        response = client.post("/v1/jobs", json=SHORT)
        check_problem(response, 429, "more than 2 per 1 minute requests with this API key")
        assert 0 < int(response.headers["retry-after"]) <= 60
        assert client.get("/v1/models").status_code == 200  # only generations count


def test_fal_and_replicate(client: httpx.Client) -> None:
    body = {"prompt": "portrait", "seed": 4, "num_inference_steps": 2, "id_weight": 0.5}
    fal = {**body, "reference_image_url": PHOTO, "image_size": {"width": 96, "height": 96}}
    answer = client.post("/fal-ai/flux-pulid", json={**fal, "sync_mode": True}).json()
    assert answer.keys() == {"images", "timings", "seed", "prompt"}
    assert answer["images"][0]["url"].startswith("data:image/png;base64,")
    replicate = {
        "prompt": "portrait",
        "seed": 4,
        "num_steps": 2,
        "id_weight": 0.5,
        "main_face_image": PHOTO,
        "width": 96,
        "height": 96,
        "output_format": "webp",
        "output_quality": 80,
    }
    other = client.post("/fal-ai/flux-pulid", json=replicate).json()
    image = Image.open(BytesIO(client.get(other["images"][0]["url"]).content))
    assert (image.format, image.size) == ("WEBP", (96, 96))
    png = httpx.get(other["images"][0]["url"].partition("?")[0]).content
    same = base64.b64decode(answer["images"][0]["url"].partition(",")[2])
    assert (np.asarray(Image.open(BytesIO(png))) == np.asarray(Image.open(BytesIO(same)))).all()
    check_problem(
        client.post("/fal-ai/flux-pulid", json=body), 400, "set one of reference_image_url"
    )
    named = {**fal, "image_size": "square_hd"}
    check_problem(client.post("/fal-ai/flux-pulid", json=named), 400, "1024x1024: width and height")
    for size, sentence in (
        (
            "huge",
            "image_size must be square_hd, square, portrait_4_3, portrait_16_9, landscape_4_3, "
            "landscape_16_9, or an object with width and height, got 'huge'.",
        ),
        ({"width": "big", "height": 96}, "image_size.width must be a whole number, got 'big'."),
    ):
        answer = client.post("/fal-ai/flux-pulid", json={**fal, "image_size": size})
        assert check_problem(answer, 400)["detail"] == sentence
    linked = {**fal, "reference_image_url": "https://example.org/a.png"}
    problem = check_problem(client.post("/fal-ai/flux-pulid", json=linked), 400)
    assert problem["detail"].startswith("reference_image_url must be a data: URL")


def test_a_fault_of_the_service_is_no_invalid_request() -> None:
    request = GenerationRequest(prompt="portrait")
    now = datetime.now(timezone.utc)
    job = Job("job-1", "anna", JobStatus.FAILED, request, (), 0, 0, now, problem="no file.")
    assert to_problem(job).status == 400
    problem = to_problem(replace(job, is_service_problem=True))
    assert (problem.status, problem.details.error.type) == (503, "server_error")
