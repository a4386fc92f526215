"""The queue on both databases: acknowledged jobs stay, every image is published once."""

from __future__ import annotations

import os
import stat
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from openpulid.errors import (
    FaceError,
    OptionError,
    QueueFullError,
    StoreError,
    explain_out_of_memory,
)
from openpulid.pipelines.request_fields import RequestError
from openpulid.pipelines.request_inputs import Control, Lora, Person
from openpulid.service.jobs import JobStatus, Output
from openpulid.service.store.database import Database
from openpulid.service.store.jobs import JobStore
from tests.service.conftest import Clock, portrait

OUTPUT = Output(b"an image", 64, 48)
PERSON = {"people.0.images.0": b"a face"}


def with_person(**options: Any):
    return portrait(people=[Person(images=["face"])], **options)


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("data/jobs/*/outputs/*"))


def test_an_accepted_job_is_there_after_a_restart(
    store: JobStore, database_url: str | None, tmp_path: Path
) -> None:
    job = store.submit("ann", with_person(num_images=2), PERSON, "key")
    assert job.status == JobStatus.QUEUED and job.total_steps == 0 and not job.images
    assert job.request.people[0].images == ("people-0-images-0",)
    again = Database.open(tmp_path / "data", database_url)
    assert JobStore(again, tmp_path / "data").get("ann", job.id) == job
    again.close()


def test_only_its_owner_sees_a_job(store: JobStore) -> None:
    job = store.submit("ann", portrait(), {}, None)
    assert store.get("ben", job.id) is None and store.cancel("ben", job.id) is None
    assert store.get("ann", "job-1") is None
    assert store.get("ann", job.id) == job


def test_files_are_private_and_have_names_of_the_service(store: JobStore, tmp_path: Path) -> None:
    store.submit("ann", with_person(), PERSON, None)
    store.publish(*store.claim("worker", 1, 10), OUTPUT)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
    for path in [tmp_path / "data", *(tmp_path / "data").rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"people": [Person(images=["/etc/passwd"])]}, "people.0.images.0"),
        ({"loras": [Lora("/etc/passwd")]}, "loras.0.model"),
        ({"controls": [Control("control-pose", "/etc/passwd")]}, "controls.0.image"),
    ],
)
def test_no_path_of_a_request_is_read(
    create_store: Callable[..., JobStore], options: dict[str, Any], field: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as error:
        create_store().submit("ann", portrait(**options), {}, None)
    assert error.value.fields == (field,)
    assert not list(tmp_path.glob("data/jobs/*"))


def test_a_field_cannot_name_a_file(store: JobStore, tmp_path: Path) -> None:
    with pytest.raises((StoreError, RequestError, KeyError)):
        store.submit("ann", portrait(), {"../../escape": b""}, None)
    assert not list(tmp_path.rglob("*escape*")) and not list(tmp_path.glob("data/jobs/*"))


def test_a_task_is_the_request_of_one_image(store: JobStore, tmp_path: Path) -> None:
    job = store.submit("ann", with_person(num_images=3, seed=7), PERSON, "key")
    tasks = store.claim("worker", 2, 10)
    assert [(task.index, task.request.seed, task.request.num_images) for task in tasks] == [
        (0, 7, 1),
        (1, 8, 1),
    ]
    file = Path(tasks[0].request.people[0].images[0])
    assert file.read_bytes() == b"a face" and file.is_relative_to(tmp_path / "data/jobs" / job.id)
    running = store.get("ann", job.id)
    assert running is not None and running.status == JobStatus.RUNNING and running.started
    assert store.count_waiting() == 1 and store.position(job.id) == 0


def test_the_last_image_completes_a_job(store: JobStore, clock: Clock, tmp_path: Path) -> None:
    job_id = store.submit("ann", with_person(num_images=2, seed=7), PERSON, "key").id
    first, second = store.claim("worker", 2, 10)
    assert store.publish(second, Output(b"two", 8, 9))
    job = store.get("ann", job_id)
    assert job is not None and job.status == JobStatus.RUNNING
    assert [(image.index, image.seed) for image in job.images] == [(1, 8)]
    clock.now += 5
    assert store.publish(first, Output(b"one", 8, 9))
    job = store.get("ann", job_id)
    assert job is not None and job.status == JobStatus.COMPLETED
    assert [image.file and image.file.read_bytes() for image in job.images] == [b"one", b"two"]
    assert job.finished and job.finished.timestamp() == clock.now
    assert job.expires and job.expires.timestamp() == clock.now + 24 * 3600
    assert not list(tmp_path.glob("data/jobs/*/inputs"))  # they show a person


def test_an_image_is_published_once(store: JobStore, tmp_path: Path) -> None:
    """A worker whose connection broke while it published tries again."""
    job_id = store.submit("ann", portrait(), {}, None).id
    (task,) = store.claim("worker", 1, 10)
    assert store.publish(task, OUTPUT)
    published = store.get("ann", job_id)
    assert store.publish(task, Output(b"another", 1, 1))
    assert store.get("ann", job_id) == published
    file = published and published.images[0].file
    assert file and file.read_bytes() == b"an image" and len(outputs(tmp_path)) == 1


def test_images_of_a_lost_worker_go_to_another(
    store: JobStore, clock: Clock, tmp_path: Path
) -> None:
    job_id = store.submit("ann", portrait(), {}, "key").id
    (lost,) = store.claim("one", 1, 10)
    clock.now += 8
    store.renew([lost], 10)
    clock.now += 8
    assert not store.claim("two", 1, 10)
    clock.now += 3
    (task,) = store.claim("two", 1, 10)
    assert store.list_states([lost, task])[0].is_lost
    assert not store.list_states([lost, task])[1].is_lost
    store.renew([lost], 1000)  # without effect
    assert not store.publish(lost, Output(b"late", 1, 1))
    assert not store.fail(lost, FaceError("late."))
    assert store.publish(task, OUTPUT)
    job = store.get("ann", job_id)
    assert job is not None and job.images[0].file and job.images[0].file.read_bytes() == b"an image"
    assert len(outputs(tmp_path)) == 1


def test_a_restarted_worker_continues_at_once(store: JobStore) -> None:
    job_id = store.submit("ann", portrait(), {}, None).id
    store.claim("worker", 1, 1000)
    with store.reserve("worker"):
        assert [task.job_id for task in store.claim("worker", 1, 1000)] == [job_id]
        with (
            pytest.raises(OptionError, match="another directory with --data"),
            store.reserve("worker"),
        ):
            pass


def test_a_job_that_ends_its_workers_runs_alone_and_fails(
    create_store: Callable[..., JobStore],
) -> None:
    store = create_store(interruptions=2)
    bad = store.submit("ann", portrait(), {}, "key").id
    good = store.submit("ben", portrait(), {}, "key").id
    assert len(store.claim("worker", 4, 10)) == 2
    batches = []
    for _ in range(6):
        store.recover("worker")
        batches.append([task.job_id for task in store.claim("worker", 4, 10)])
    # each runs alone, by turns, until it has interrupted the worker three times
    assert batches == [[bad], [good], [bad], [good], [], []]
    job = store.get("ann", bad)
    assert job is not None and job.status == JobStatus.FAILED
    assert job.problem and "interrupted 3 times" in job.problem and job.is_service_problem


def test_a_released_image_may_run_in_a_batch_again(store: JobStore, tmp_path: Path) -> None:
    store.submit("ann", portrait(2), {}, "key")
    tasks = store.claim("worker", 2, 10)
    store.release(tasks)
    again = store.claim("worker", 2, 10)
    assert [task.attempt for task in again] == [2, 2]
    assert store.publish(again[0], OUTPUT)
    assert not store.publish(tasks[0], Output(b"late", 1, 1))
    assert outputs(tmp_path) == ["0-2.png"]


def test_cancel_frees_the_place(store: JobStore, tmp_path: Path) -> None:
    job_id = store.submit("ann", with_person(num_images=3), PERSON, "key").id
    first, second = store.claim("worker", 2, 10)
    store.publish(first, OUTPUT)
    job = store.cancel("ann", job_id)
    assert job is not None and job.status == JobStatus.CANCELLED and len(job.images) == 1
    assert store.list_states([second])[0].is_lost
    assert not store.publish(second, OUTPUT)
    assert outputs(tmp_path) == ["0-1.png"] and not list(tmp_path.glob("data/jobs/*/inputs"))
    assert not store.claim("worker", 1, 10) and store.count_unfinished() == 0
    assert store.cancel("ann", job_id) == job


def test_a_failed_image_fails_its_job(store: JobStore, tmp_path: Path) -> None:
    job_id = store.submit("ann", with_person(num_images=3), PERSON, "key").id
    first, second = store.claim("worker", 2, 10)
    file = first.request.people[0].images[0]
    assert store.fail(first, FaceError(f"{file} shows no face."))
    job = store.get("ann", job_id)
    assert job is not None and job.status == JobStatus.FAILED
    assert job.problem == "people-0-images-0 shows no face."  # no path of the server
    assert not job.is_service_problem
    assert store.list_states([second])[0].is_lost and not store.claim("worker", 1, 10)


def test_too_little_memory_is_a_problem_of_the_service(store: JobStore) -> None:
    job = store.submit("ann", portrait(), {}, None)
    with pytest.raises(OptionError) as raised, explain_out_of_memory("try a smaller size"):
        raise RuntimeError("CUDA out of memory")
    store.fail(*store.claim("worker", 1, 10), raised.value)
    failed = store.get("ann", job.id)
    assert failed is not None and failed.is_service_problem
    assert failed.problem == "the device has too little memory; try a smaller size."


def test_owners_and_jobs_take_turns(store: JobStore) -> None:
    names = {}
    for name, num_images in [("a1", 6), ("a2", 1), ("b1", 3), ("a3", 1)]:
        names[store.submit(name[0], portrait(num_images), {}, "key").id] = name
    served = []
    while tasks := store.claim("worker", 2, 10):
        served += [names[task.job_id] for task in tasks]
        if len(served) == 4:
            names[store.submit("c", portrait(), {}, "key").id] = "c1"
    assert served == ["a1", "b1", "a2", "b1", "c1", "a3", "b1", "a1", "a1", "a1", "a1", "a1"]


def test_a_batch_has_one_key_and_the_presets_of_the_worker(store: JobStore) -> None:
    ids = [store.submit("ann", portrait(), {}, key).id for key in ("x", "y", "x")]
    flux = store.submit("ben", portrait(model={"preset": "flux"}), {}, "x").id
    assert [task.job_id for task in store.claim("worker", 9, 10, ["flux"])] == [flux]
    assert store.claim("worker", 9, 10, ["flux"]) == []
    assert [task.job_id for task in store.claim("worker", 9, 10)] == [ids[0], ids[2]]
    assert store.count_waiting() == 1 and store.count_waiting("flux") == 0


def test_no_more_jobs_than_the_limits(create_store: Callable[..., JobStore]) -> None:
    store = create_store(jobs=3, jobs_per_owner=2)
    job = store.submit("ann", portrait(), {}, None)
    store.submit("ann", portrait(), {}, None)
    with pytest.raises(QueueFullError, match="2 jobs of this key"):
        store.submit("ann", portrait(), {}, None)
    store.submit("ben", portrait(), {}, None)
    with pytest.raises(QueueFullError, match="too many"):
        store.submit("ben", portrait(), {}, None)
    store.cancel("ann", job.id)
    store.submit("ann", portrait(), {}, None)
    assert store.count_unfinished("ann") == 2 and store.count_unfinished() == 3


def test_progress_and_previews(store: JobStore, clock: Clock) -> None:
    job_id = store.submit("ann", portrait(3), {}, "key").id
    tasks = store.claim("worker", 2, 10)
    store.report_step(tasks, 3, 4)
    store.publish(tasks[0], OUTPUT)
    job = store.get("ann", job_id)
    assert job is not None and (job.step, job.total_steps) == (7, 12)
    assert job.preview is None and not store.list_states(tasks)[1].is_watched
    store.watch(job_id, 5)
    assert store.list_states(tasks)[1].is_watched
    store.save_preview(tasks[1], b"small")
    job = store.get("ann", job_id)
    assert job is not None and job.preview and job.preview.read_bytes() == b"small"
    clock.now += 6
    assert not store.list_states(tasks)[1].is_watched


def test_preview_of_a_cancelled_job_is_not_kept(store: JobStore) -> None:
    """It shows the person, and may be decoded while the job is cancelled."""
    job_id = store.submit("ann", portrait(), {}, "key").id
    tasks = store.claim("worker", 1, 10)
    store.cancel("ann", job_id)
    store.save_preview(tasks[0], b"small")
    job = store.get("ann", job_id)
    assert job is not None and job.preview is None


def test_results_expire(store: JobStore, clock: Clock, tmp_path: Path) -> None:
    done = store.submit("ann", portrait(), {}, None).id
    waiting = store.submit("ben", portrait(), {}, None).id
    store.publish(*store.claim("worker", 1, 10), OUTPUT)
    store.expire()
    assert store.get("ann", done) is not None
    clock.now += 24 * 3600
    store.expire()
    assert store.get("ann", done) is None and store.get("ben", waiting) is not None
    assert [path.name for path in tmp_path.glob("data/jobs/*")] == [waiting]


def test_inputs_of_an_ended_job_are_removed_after_a_crash(store: JobStore, tmp_path: Path) -> None:
    ended, waiting = (store.submit("ann", with_person(), PERSON, None).id for _ in range(2))
    store.cancel("ann", ended)
    for name in ("inputs/people-0-images-0", "preview.jpg"):  # as after a kill within `cancel`
        file = tmp_path / "data" / "jobs" / ended / name
        file.parent.mkdir(exist_ok=True)
        file.touch()
    store.expire()
    assert [path.name for path in (tmp_path / "data" / "jobs" / ended).iterdir()] == ["outputs"]
    assert (tmp_path / "data" / "jobs" / waiting / "inputs" / "people-0-images-0").exists()


def test_folders_without_a_job_are_removed(store: JobStore, tmp_path: Path) -> None:
    old, new = tmp_path / "data/jobs/job-old", tmp_path / "data/jobs/job-new"
    for folder in (old, new):
        (folder / "inputs").mkdir(parents=True)
    os.utime(old, (0, 0))
    store.expire()
    assert not old.exists() and new.exists()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("request", "{"),
        ("request", '{"prompt": ""}'),
        ("files", '["../../secret"]'),
        ("files", "7"),
        ("files", '["people.3.images.0"]'),
    ],
)
def test_a_damaged_record_fails_its_job_alone(
    store: JobStore, database: Database, column: str, value: str
) -> None:
    damaged = store.submit("ann", with_person(), PERSON, "key").id
    good = store.submit("ben", portrait(), {}, "key").id
    with database.write() as connection:
        statement = text(f"UPDATE jobs SET {column} = :value WHERE id = :id")
        connection.execute(statement, {"value": value, "id": damaged})
    assert [task.job_id for task in store.claim("worker", 4, 10)] == [good]
    with database.read() as connection:
        row = connection.execute(
            text("SELECT status, problem FROM jobs WHERE id = :id"), {"id": damaged}
        ).one()
    assert tuple(row) == ("failed", "the record of this job is damaged; submit it again.")
    if column == "request":
        with pytest.raises(StoreError, match="record of this job is damaged"):
            store.get("ann", damaged)


def test_a_job_without_tasks_is_damaged(store: JobStore, database: Database) -> None:
    job_id = store.submit("ann", portrait(), {}, "key").id
    with database.write() as connection:
        connection.execute(text("DELETE FROM tasks"))
    assert store.claim("worker", 4, 10) == []
    with pytest.raises(StoreError, match="record of this job is damaged"):
        store.get("ann", job_id)


def test_a_missing_input_fails_its_job_alone(store: JobStore, tmp_path: Path) -> None:
    broken = store.submit("ann", with_person(), PERSON, "key").id
    good = store.submit("ben", portrait(), {}, "key").id
    next(tmp_path.glob("data/jobs/*/inputs/people*")).unlink()
    assert [task.job_id for task in store.claim("worker", 4, 10)] == [good]
    job = store.get("ann", broken)
    assert job is not None and job.status == JobStatus.FAILED
    assert job.problem == "an input file of this job is missing; submit it again."
    assert job.is_service_problem


def test_a_missing_result_has_no_file(store: JobStore, tmp_path: Path) -> None:
    job_id = store.submit("ann", portrait(), {}, None).id
    store.publish(*store.claim("worker", 1, 10), OUTPUT)
    next(tmp_path.glob("data/jobs/*/outputs/*")).unlink()
    job = store.get("ann", job_id)
    assert job is not None and job.images[0].file is None


def test_many_workers_publish_every_image_once(store: JobStore, tmp_path: Path) -> None:
    counts = {store.submit(f"owner{k % 3}", portrait(4), {}, "key").id: 4 for k in range(12)}
    published: list[tuple[str, int]] = []

    def work(name: str) -> None:
        while tasks := store.claim(name, 3, 10):
            for task in tasks:
                if store.publish(task, OUTPUT):
                    published.append((task.job_id, task.index))

    threads = [threading.Thread(target=work, args=(f"worker{k}",)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(job_id for job_id, _ in published) == counts
    assert len(set(published)) == len(published) == len(outputs(tmp_path))
    assert store.count_unfinished() == 0
