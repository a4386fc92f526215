"""The service on Ray: real replicas with the miniature, which are killed, drained and cancelled.

Their order is the life of one cluster.
"""

from __future__ import annotations

import base64
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from openpulid.identity.identity import Identity
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.pipelines.request_inputs import Person
from openpulid.ray_session import ENVIRONMENT
from openpulid.service.cluster.run import APPLICATION
from openpulid.service.config import ServiceConfig
from openpulid.service.jobs import Job, JobStatus
from openpulid.service.queue.engine import LocalEngine
from openpulid.service.store.database import Database
from openpulid.service.store.jobs import JobStore

pytest.importorskip("ray.serve", reason="ray[serve] is not installed", exc_type=ImportError)

import ray
from ray import serve

from openpulid.service.cluster.application import ClusterOptions, build

MINI = ModelSelection(preset="mini")
PORTRAIT = Path(__file__).parents[1] / "data" / "images" / "person-1000007.png"
LONG = 1000
"""Steps of jobs that are cancelled."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def store(data: Path) -> Iterator[JobStore]:
    database = Database.open(data)
    yield JobStore(database, data)
    database.close()


@pytest.fixture(scope="module")
def accepted(store: JobStore) -> list[str]:
    """Two jobs that have been accepted before the service starts."""
    return [submit(store, seed, steps=LONG) for seed in (1, 2)]


def find_port() -> int:
    """Find a free port that no outgoing connection gets: Ray opens many before it binds this."""
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no port is free")


@pytest.fixture(scope="module")
def url(data: Path, accepted: list[str]) -> Iterator[str]:
    """Address of a service with two replicas, and only one while no batch waits."""
    port = find_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.delenv("RAY_AUTH_MODE", raising=False)  # `ray.init` sets it, and reads the token
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        options = ClusterOptions(
            service=ServiceConfig(data),
            api_keys=None,
            initial_replicas=2,
            max_replicas=2,
            gpus_per_replica=0,
            idle_seconds=5,
        )
        serve.run(build(options), name=APPLICATION)
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


def submit(store: JobStore, seed: int = 1, steps: int = 4, **options: Any) -> str:
    options = {"model": MINI, "width": 64, "height": 64, **options}
    request = GenerationRequest("portrait", seed=seed, num_inference_steps=steps, **options)
    files = {field: PORTRAIT.read_bytes() for field, _ in request.input_files() if "peo" in field}
    return store.submit("local", request, files, batch_key=None).id


def wait(store: JobStore, job_id: str, until: Callable[[Job], bool], seconds: float = 60) -> Job:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job = store.get("local", job_id)
        assert job is not None
        if until(job):
            return job
        time.sleep(0.02)
    raise TimeoutError(job)


def is_running(job: Job) -> bool:
    return job.step > 0


def is_final(job: Job) -> bool:
    return job.status.is_final


def find_processes(deployment: str) -> list[psutil.Process]:
    name = f"ray::ServeReplica:{APPLICATION}:{deployment}"
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has just ended
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def published(data: Path, job_id: str) -> list[str]:
    """Return the files of a job, IMAGE-ATTEMPT.png."""
    return [file.name for file in (data / "jobs" / job_id / "outputs").iterdir()]


def gray_image() -> bytes:
    content = BytesIO()
    Image.new("RGB", (96, 96), "gray").save(content, "PNG")
    return content.getvalue()


def wait_for_one_replica() -> None:
    deadline = time.monotonic() + 60
    while len(find_processes("preset-mini")) != 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(find_processes("preset-mini")) == 1


def test_cancelled_jobs_free_their_replicas(
    store: JobStore, accepted: list[str], url: str, data: Path
) -> None:
    for job_id in accepted:
        assert wait(store, job_id, is_running).status == JobStatus.RUNNING
    assert len(find_processes("preset-mini")) == 2  # each runs one batch at a time
    for job_id in accepted:
        store.cancel("local", job_id)
    start = time.monotonic()
    assert wait(store, submit(store), is_final).status == JobStatus.COMPLETED
    assert time.monotonic() - start < 20  # the cancelled ones would take minutes
    for job_id in accepted:
        assert wait(store, job_id, is_final).step < LONG and not published(data, job_id)


def test_a_replica_is_drained_before_it_stops(store: JobStore, data: Path, url: str) -> None:
    ids = [submit(store, seed, steps=300) for seed in (1, 2)]
    for job_id in ids:
        wait(store, job_id, is_running)
    store.cancel("local", ids[0])  # one replica is enough now, and Ray stops any of both
    assert wait(store, ids[1], is_final).status == JobStatus.COMPLETED
    assert published(data, ids[1]) == ["0-1.png"]
    wait_for_one_replica()


@pytest.mark.parametrize("method", [None, "faceid"])
def test_image_equals_that_of_a_local_engine(url: str, store: JobStore, method: str | None) -> None:
    models = MINI.model_copy(update={"method": method})
    person = Person(images=[str(PORTRAIT)])
    job_id = submit(store, 3, model=models, people=[person], num_images=2)
    job = wait(store, job_id, is_final)
    assert job.status == JobStatus.COMPLETED and job.step == job.total_steps == 8
    studio = LocalEngine("cpu").studio(models)
    for image in job.images:
        assert image.file is not None and image.seed == 3 + image.index
        asked = Provenance.read(image.file)
        assert set(asked.input_hashes) == {"people.0.images.0"}
        request = asked.restore({"people.0.images.0": PORTRAIT})
        alone = np.asarray(studio.generate(request).images[0]).astype(int)
        assert np.abs(np.asarray(Image.open(image.file)).astype(int) - alone).max() <= 2


def test_identities_are_extracted_on_a_replica(url: str, tmp_path: Path) -> None:
    files = [("image", (PORTRAIT.name, PORTRAIT.read_bytes(), "image/png"))]
    created = httpx.post(f"{url}/v1/identities", files=files, timeout=60)
    assert created.status_code == 201, created.text
    file = tmp_path / "person.safetensors"
    file.write_bytes(httpx.get(f"{url}/v1/identities/{created.json()['id']}/file").content)
    expected = LocalEngine("cpu").identify(MINI, [PORTRAIT])
    assert np.allclose(Identity.load(file).id_cond, expected.id_cond, atol=1e-5)

    wall = httpx.post(
        f"{url}/v1/identities", files=[("image", ("wall.png", gray_image()))], timeout=60
    )
    assert wall.status_code == 400, wall.text
    assert wall.json()["detail"].startswith("people.0.images.0: no face detected")


def test_openai_shape(url: str) -> None:
    body = {"prompt": "portrait", "num_inference_steps": 2, "n": 2}
    answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    images = [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]
    assert len(images) == 2 and all(image.startswith(b"\x89PNG") for image in images)


def test_previews_are_sent_while_somebody_watches(url: str, store: JobStore) -> None:
    job_id = submit(store, steps=LONG)
    job = wait(store, job_id, is_running)
    assert job.preview is None
    store.watch(job_id, 60)
    job = wait(store, job_id, lambda job: job.preview is not None)
    assert job.preview is not None and Image.open(job.preview).size == (64, 64)
    store.cancel("local", job_id)


def test_killed_processes_lose_nothing(store: JobStore, data: Path, url: str) -> None:
    ids = [submit(store, seed, steps=100) for seed in (1, 2)]
    wait(store, ids[0], is_running)
    replica, ingress = find_processes("preset-mini")[0], find_processes("ingress")[0]
    replica.kill()
    wait(store, ids[0], lambda job: not is_running(job))  # it waits for another replica
    ingress.kill()
    jobs = [wait(store, job_id, is_final, 120) for job_id in ids]
    assert [job.status for job in jobs] == [JobStatus.COMPLETED] * 2
    for job_id in ids:
        [name] = published(data, job_id)
        assert name != "0-1.png"
        assert httpx.get(f"{url}/v1/jobs/{job_id}").json()["status"] == "completed"


def test_a_stopped_service_leaves_its_jobs_to_the_next(
    store: JobStore, data: Path, url: str
) -> None:
    job_id = submit(store, steps=LONG)
    wait(store, job_id, is_running)
    serve.delete(APPLICATION)
    assert store.position(job_id) == 0
    assert not find_processes("preset-mini") and not find_processes("ingress")
    assert not published(data, job_id)
