"""Two servers with one PostgreSQL database and one data folder serve the same jobs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from openpulid.service.api.app import create_app
from openpulid.service.config import Limits, ServiceConfig
from openpulid.service.server import open_backend
from tests.service.api.conftest import PORTRAIT, serve, wait_for_end
from tests.support.postgres import create_database


@pytest.fixture(scope="module")
def servers(
    postgres: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, httpx.Client]]:
    data = tmp_path_factory.mktemp("service") / "data"
    database = create_database(postgres, "servers")
    clients = {}
    with ExitStack() as stack:
        for worker in ("one", "two"):
            limits = Limits(rate="100000/minute")
            config = ServiceConfig(data, limits=limits, database=database, worker=worker)
            backend = stack.enter_context(open_backend(config))
            while not backend.is_ready():  # two threads cannot load models at once
                time.sleep(0.05)
            url = stack.enter_context(serve(create_app(backend)))
            clients[worker] = stack.enter_context(httpx.Client(base_url=url, timeout=60))
        yield clients


def test_jobs_of_one_server_are_jobs_of_the_other(servers: dict[str, httpx.Client]) -> None:
    one, two = servers.values()
    with PORTRAIT.open("rb") as file:
        identity = one.post("/v1/identities", files={"image": file}).json()
    assert two.get(f"/v1/identities/{identity['id']}").json()["id"] == identity["id"]
    body = {"prompt": "portrait", "num_steps": 20, "people": [{"identity": identity["id"]}]}
    jobs = [one.post("/v1/jobs", json={**body, "seed": seed}).json() for seed in range(8)]
    ended = [wait_for_end(two, job) for job in jobs]
    assert [job["status"] for job in ended] == ["completed"] * 8
    for job in ended:
        image = job["images"][0]
        path = f"/v1/jobs/{job['id']}/images/{image['index']}"
        assert one.get(path).content == two.get(path).content


def test_job_is_cancelled_at_the_other_server(servers: dict[str, httpx.Client]) -> None:
    one, two = servers.values()
    job = one.post("/v1/jobs", json={"prompt": "portrait", "num_steps": 100, "n": 8}).json()
    assert two.delete(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"
    assert wait_for_end(one, job)["status"] == "cancelled"
