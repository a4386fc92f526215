"""A real server with the miniature, for all tests of the HTTP API."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="extra service is not installed", exc_type=ImportError)

import httpx
import uvicorn
from fastapi import FastAPI

from openpulid.pipelines.request import ModelSelection
from openpulid.service.api.access import ApiKeys
from openpulid.service.api.app import create_app
from openpulid.service.api.backend import Backend
from openpulid.service.config import Limits, ServiceConfig
from openpulid.service.server import open_backend

ANNA, BEN = "anna-0123456789-abcdef", "ben-0123456789-abcdefg"
"""Two API keys."""

PORTRAIT = Path(__file__).parents[2] / "data" / "images" / "person-1000007.png"
"""A synthetic person."""

PHOTO = "data:image/png;base64," + base64.b64encode(PORTRAIT.read_bytes()).decode()
"""The same as a data: URL."""


@contextmanager
def serve(app: FastAPI) -> Iterator[str]:
    """Serve an application in a thread, and return its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    config = ServiceConfig(
        tmp_path_factory.mktemp("service") / "data",
        (ModelSelection(preset="mini"), ModelSelection(preset="mini-lightning")),
        Limits(rate="100000/minute"),
        max_studios=2,
    )
    with open_backend(config) as backend:
        for _ in range(1200):  # tests load models, too, which two threads cannot do
            if backend.is_ready():
                break
            time.sleep(0.05)
        assert backend.is_ready()
        yield backend


@pytest.fixture(scope="session")
def url(backend: Backend) -> Iterator[str]:
    """Address of a service without API keys."""
    with serve(create_app(backend)) as url:
        yield url


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> ApiKeys:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# two keys\nanna {ANNA}\n\nben {BEN}\n")
    return ApiKeys.read(file)


@pytest.fixture(scope="session")
def keyed_url(backend: Backend, keys: ApiKeys) -> Iterator[str]:
    """Address of the same service with API keys."""
    with serve(create_app(backend, keys)) as url:
        yield url


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def as_owner(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {key}"})


@pytest.fixture(scope="session")
def anna(keyed_url: str) -> Iterator[httpx.Client]:
    with as_owner(keyed_url, ANNA) as client:
        yield client


@pytest.fixture(scope="session")
def ben(keyed_url: str) -> Iterator[httpx.Client]:
    with as_owner(keyed_url, BEN) as client:
        yield client


@contextmanager
def limited(backend: Backend, **limits: Any) -> Iterator[httpx.Client]:
    """Open a client of a service with other limits."""
    config = replace(backend.config, limits=replace(backend.config.limits, **limits))
    with (
        serve(create_app(replace(backend, config=config))) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def wait_for_end(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """Return a job when it has ended."""
    for _ in range(600):
        job = client.get(f"/v1/jobs/{job['id']}").json()
        if job["status"] in ("completed", "failed", "cancelled"):
            return job
        time.sleep(0.05)
    raise AssertionError(f"the job has not ended: {job}")


def check_problem(response: httpx.Response, status: int, sentence: str = "") -> dict[str, Any]:
    """Check that a response is an error, in the form that the service documents."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem.keys() == {"type", "title", "status", "detail", "fields", "error"}
    assert problem["status"] == status
    assert problem["error"]["message"] == problem["detail"]
    assert sentence in problem["detail"]
    return problem
