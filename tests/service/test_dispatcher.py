"""The worker with the shipped miniature: batches, cancellation, restarts, failures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openpulid.errors import OptionError
from openpulid.io.image_grid import to_pil
from openpulid.pipelines.batching import batch_key
from openpulid.pipelines.inputs import open_inputs
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.pipelines.request_inputs import Person
from openpulid.pipelines.selection import resolve_preset
from openpulid.service.jobs import Job, JobStatus
from openpulid.service.queue.dispatcher import Dispatcher
from openpulid.service.queue.engine import NOT_LOADED, LocalEngine
from openpulid.service.store.database import Database
from openpulid.service.store.jobs import JobStore
from openpulid.world import Person as DrawnPerson
from openpulid.world import Scene, render

MINI = ModelSelection(preset="mini")
SHORT = {"num_inference_steps": 4, "width": 64, "height": 64}
LONG = {**SHORT, "num_inference_steps": 200}


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    engine = LocalEngine(device="cpu")
    engine.studio(MINI)
    return engine


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Images of three people, and one of nobody."""
    people = [DrawnPerson(skin_tone=0.1), DrawnPerson(skin_tone=0.9), DrawnPerson(jaw_width=1)]
    rendering = render(people, [Scene()] * 3, size=96)
    images = to_pil(rendering.image)
    images.append(Image.new("RGB", (96, 96), "gray"))
    folder = tmp_path_factory.mktemp("faces")
    files = [folder / f"{k}.png" for k in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    return files


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    database = Database.open(tmp_path)
    yield JobStore(database, tmp_path)
    database.close()


@pytest.fixture
def work(store: JobStore, engine: LocalEngine) -> Iterator[Callable[..., Dispatcher]]:
    dispatchers = []

    def start(**options: Any) -> Dispatcher:
        dispatchers.append(Dispatcher(store, engine, "worker", **options))
        dispatchers[-1].start()
        return dispatchers[-1]

    yield start
    for dispatcher in dispatchers:
        dispatcher.stop()


def request(prompt: str = "portrait", face: Path | None = None, **options: Any):
    people = [] if face is None else [Person(images=[str(face)])]
    return GenerationRequest(prompt, people=people, model=MINI, **{**SHORT, **options})


def submit(store: JobStore, owner: str, asked: GenerationRequest) -> str:
    preset = resolve_preset(MINI)
    resolved = preset.resolve(asked, bool(asked.people))
    key = batch_key(resolved, open_inputs(resolved, preset.models))
    files = {
        field: Path(name).read_bytes() for field, name in asked.input_files() if "people" in field
    }
    return store.submit(owner, resolved, files, key).id


def wait(store: JobStore, owner: str, job_id: str, until: Callable[[Job], bool]) -> Job:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job = store.get(owner, job_id)
        assert job is not None
        if until(job):
            return job
        time.sleep(0.01)
    raise TimeoutError(job)


def finish(store: JobStore, owner: str, job_id: str) -> Job:
    return wait(store, owner, job_id, lambda job: job.status.is_final)


def pixels(file: Path | None) -> np.ndarray:
    assert file is not None
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_images_of_a_batch_equal_single_runs(
    store: JobStore, engine: LocalEngine, faces: list[Path], work: Callable[..., Dispatcher]
) -> None:
    asked = [
        request("portrait, smiling", faces[0], seed=3, num_images=2),
        request("portrait, red hat", faces[1], seed=3),
        request("portrait, smiling", faces[2], seed=3),
    ]
    ids = [submit(store, f"owner{k}", one) for k, one in enumerate(asked)]
    tasks = store.claim("other", 4, 10)
    assert len(tasks) == 4  # one batch
    store.release(tasks)
    work(max_batch=4)
    jobs = [finish(store, f"owner{k}", job_id) for k, job_id in enumerate(ids)]
    studio = engine.studio(MINI)
    for job, one in zip(jobs, asked, strict=True):
        assert job.status == JobStatus.COMPLETED and job.step == job.total_steps == 4 * len(
            job.images
        )
        single = studio.generate(one).images
        for image, alone in zip(job.images, single, strict=True):
            assert np.abs(pixels(image.file) - np.asarray(alone).astype(int)).max() <= 2
            assert image.file is not None
            stored = Provenance.read(image.file)
            assert stored.request.seed == image.seed == 3 + image.index
            assert set(stored.input_hashes) == {"people.0.images.0"}
    differing = [jobs[0].images[0], jobs[1].images[0], jobs[2].images[0]]
    for k, image in enumerate(differing):
        for other in differing[:k]:
            assert np.abs(pixels(image.file) - pixels(other.file)).max() > 20


def test_a_request_without_a_face_fails_alone(
    store: JobStore, faces: list[Path], work: Callable[..., Dispatcher]
) -> None:
    ids = [submit(store, "ann", request(face=face)) for face in (faces[0], faces[3], faces[1])]
    work()
    jobs = [finish(store, "ann", job_id) for job_id in ids]
    assert [job.status for job in jobs] == [
        JobStatus.COMPLETED,
        JobStatus.FAILED,
        JobStatus.COMPLETED,
    ]
    assert jobs[1].problem and jobs[1].problem.startswith("people-0-images-0")
    assert str(faces[3].parent) not in jobs[1].problem and "jobs/" not in jobs[1].problem


def test_a_word_that_the_model_does_not_know_fails_alone(
    store: JobStore, work: Callable[..., Dispatcher]
) -> None:
    ids = [submit(store, "ann", request(prompt)) for prompt in ("portrait", "zeppelin", "smiling")]
    work()
    jobs = [finish(store, "ann", job_id) for job_id in ids]
    assert [job.status.value for job in jobs] == ["completed", "failed", "completed"]
    assert jobs[1].problem and "zeppelin" in jobs[1].problem


def test_a_cancelled_job_frees_its_place_between_two_steps(
    store: JobStore, work: Callable[..., Dispatcher]
) -> None:
    long = submit(store, "ann", request(**LONG))
    work()
    wait(store, "ann", long, lambda job: job.step > 0)
    short = submit(store, "ben", request())
    store.cancel("ann", long)
    assert finish(store, "ben", short).status == JobStatus.COMPLETED
    job = store.get("ann", long)
    assert job is not None and job.status == JobStatus.CANCELLED
    assert 0 < job.step < 200 and not job.images


def test_previews_are_made_while_somebody_watches(
    store: JobStore, work: Callable[..., Dispatcher]
) -> None:
    job_id = submit(store, "ann", request(**LONG))
    work()
    wait(store, "ann", job_id, lambda job: job.step > 10)
    job = store.get("ann", job_id)
    assert job is not None and job.preview is None
    store.watch(job_id, 60)
    job = wait(store, "ann", job_id, lambda job: job.preview is not None)
    assert pixels(job.preview).shape == (64, 64, 3)
    store.cancel("ann", job_id)


def test_a_stopped_worker_leaves_its_work_to_the_next(
    store: JobStore, work: Callable[..., Dispatcher]
) -> None:
    job_id = submit(store, "ann", request(**LONG))
    dispatcher = work()
    with pytest.raises(OptionError, match="in use by another process"):
        work()
    wait(store, "ann", job_id, lambda job: job.step > 0)
    start = time.monotonic()
    dispatcher.stop()
    assert time.monotonic() - start < 2
    assert store.position(job_id) == 0 and store.count_waiting() == 1
    work()
    assert wait(store, "ann", job_id, lambda job: job.step > 0).status == JobStatus.RUNNING
    store.cancel("ann", job_id)


def test_a_result_that_cannot_be_stored_is_stored_later(
    store: JobStore, work: Callable[..., Dispatcher], tmp_path: Path
) -> None:
    job_id = submit(store, "ann", request())
    folder = tmp_path / "jobs" / job_id / "outputs"
    folder.rmdir()
    folder.touch()  # no file can be written in it
    work()
    wait(store, "ann", job_id, lambda job: job.step == 4)
    time.sleep(0.2)
    assert store.count_unfinished() == 1
    folder.unlink()
    job = finish(store, "ann", job_id)
    assert job.status == JobStatus.COMPLETED and pixels(job.images[0].file).shape == (64, 64, 3)


def test_damaged_weights_are_a_problem_of_the_service(store: JobStore, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes(b"damaged")
    models = MINI.model_copy(update={"adapter": str(adapter)})
    job_id = store.submit("ann", request().model_copy(update={"model": models}), {}, None).id
    dispatcher = Dispatcher(store, LocalEngine(device="cpu"), "worker")
    dispatcher.start()
    job = finish(store, "ann", job_id)
    dispatcher.stop()
    assert job.problem == NOT_LOADED and job.is_service_problem


def test_another_method_replaces_the_studio(engine: LocalEngine) -> None:
    other = MINI.model_copy(update={"method": "faceid"})
    engine.studio(other)
    assert engine.loaded == [other]
    engine.studio(MINI)
    assert engine.loaded == [MINI]


def test_identity_needs_no_base_model_and_does_not_wait(faces: list[Path]) -> None:
    """Another preset than the one that generates must not remove it from memory."""
    engine = LocalEngine(device="cpu")
    studio = engine.studio(ModelSelection())
    with engine._device_lock, ThreadPoolExecutor(1) as pool:  # as while a batch runs
        found = pool.submit(engine.identify, ModelSelection(preset="mini-lightning"), [faces[0]])
        identity = found.result(timeout=60)
    assert engine.loaded == [studio.preset.selection]
    assert identity.fingerprint == studio.identify([faces[0]]).fingerprint


@pytest.mark.parametrize("name", ["gpu_0", "", "-a", "a/b"])
def test_bad_name_of_a_worker_is_one_sentence(store: JobStore, name: str) -> None:
    with (
        pytest.raises(OptionError, match="has letters, digits, dots and dashes, and begins with"),
        store.reserve(name),
    ):
        pass
