"""Between rows of the database, files of a job, and the objects of `service.jobs`."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openpulid.errors import OutputError, StoreError
from openpulid.io.files import write_bytes
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import RequestError
from openpulid.service.jobs import Job, JobImage, JobStatus, Task
from openpulid.service.store.files import (
    link_durably,
    make_private_folder,
    plain_errors,
    remove_file,
    remove_folder,
    sync_folder,
    write_durably,
)
from openpulid.service.store.tables import to_datetime

logger = logging.getLogger(__name__)

DAMAGED = "the record of this job is damaged; submit it again."
MISSING_INPUT = "an input file of this job is missing; submit it again."

SERVER_FIELDS = re.compile(r"model\..+|controls\.[0-9]+\.model|style_image\.model")
"""Fields that hold what the server offers, not a file of the client's."""

TENSOR_FIELDS = (".identity", ".model", ".file")
"""Last parts of the fields of safetensors files: LoRAs and embeddings are read by their suffix."""

FIELD = re.compile(r"[a-z_]+(\.[0-9]{1,4}|\.[a-z_]+)*")


class JobFolder:
    """The files of one job: `inputs/<field>`, `outputs/<index>-<attempt>.png`, `preview.jpg`.

    Every name is made here from a field or a number; none comes from a client.

    Args:
        jobs: the folder of all jobs.
        job_id: the job.
    """

    def __init__(self, jobs: Path, job_id: str) -> None:
        self.path = jobs / job_id
        self.inputs = self.path / "inputs"
        self.preview = self.path / "preview.jpg"

    def create(self, files: Mapping[str, bytes | Path]) -> None:
        """Create the folder with input files; all of it is on the disk when this returns.

        Args:
            files: path of a field -> content, or a file of the data folder that is linked.

        Raises:
            StoreError: the disk is full, or a linked file is missing; nothing is left.
        """
        try:
            make_private_folder(self.path)
            make_private_folder(self.inputs)
            make_private_folder(self.path / "outputs")
            for field, content in files.items():
                if isinstance(content, Path):
                    link_durably(content, self.input(field))
                else:
                    write_durably(self.input(field), content)
            with plain_errors(self.path):
                sync_folder(self.path)
                sync_folder(self.path.parent)
        except BaseException:
            self.remove()
            raise

    def input(self, field: str) -> Path:
        """Return the file of a field."""
        return self.inputs / input_name(field)

    def output(self, index: int, attempt: int) -> Path:
        """Return the file of an image."""
        return self.path / "outputs" / f"{index}-{attempt}.png"

    def save_output(self, index: int, attempt: int, content: bytes) -> Path:
        """Write an image; it is on the disk when this returns.

        A claim has one image, so a file of that name has been written completely before.

        Raises:
            StoreError: the disk is full.
        """
        file = self.output(index, attempt)
        make_private_folder(self.path)
        make_private_folder(file.parent)
        if not file.exists():
            write_durably(file, content)
        return file

    def save_preview(self, content: bytes) -> None:
        """Replace the preview. It is not needed for anything, so a failure is only logged."""
        try:
            write_bytes(self.preview, content, private=True)
        except OutputError as error:
            logger.warning("%s", error)

    def remove_inputs(self) -> None:
        """Remove what shows people, as soon as no image needs it any more."""
        remove_folder(self.inputs)
        remove_file(self.preview)

    def remove(self) -> None:
        """Remove everything."""
        remove_folder(self.path)


def input_name(field: str) -> str:
    """Return the name of an input file, such as `people-0-images-0`."""
    if not FIELD.fullmatch(field):
        raise StoreError(DAMAGED)
    suffix = ".safetensors" if field.endswith(TENSOR_FIELDS) else ""
    return field.replace(".", "-") + suffix


def list_inputs(request: GenerationRequest) -> list[tuple[str, str]]:
    """Return the fields that name files of the client's, and these files."""
    return [
        (field, path) for field, path in request.input_files() if not SERVER_FIELDS.fullmatch(field)
    ]


def name_inputs(request: GenerationRequest, files: Mapping[str, bytes | Path]) -> GenerationRequest:
    """Return a request whose input files are names within the job's folder.

    Raises:
        RequestError: a field names a file that is not among `files`.
    """
    for field, _ in list_inputs(request):
        if field not in files:
            raise RequestError("{0} must be an uploaded file.", field)
    return request.with_files({field: input_name(field) for field in files})


def read_job(row: Any, task_rows: Sequence[Any], folder: JobFolder) -> Job:
    """Build a job from its rows.

    Raises:
        StoreError: a row is damaged.
    """
    with _report_damage():
        request = GenerationRequest.model_validate_json(row.request)
        steps_per_image = max(task.total_steps for task in task_rows)
        finished = [task for task in task_rows if task.status == JobStatus.COMPLETED]
        unfinished_steps = sum(task.step for task in task_rows if task not in finished)
        return Job(
            id=row.id,
            owner=row.owner,
            status=JobStatus(row.status),
            request=request,
            images=tuple(_read_image(task, request, folder) for task in finished),
            step=len(finished) * steps_per_image + unfinished_steps,
            total_steps=len(task_rows) * steps_per_image,
            created=to_datetime(row.created),
            started=None if row.started is None else to_datetime(row.started),
            finished=None if row.finished is None else to_datetime(row.finished),
            expires=None if row.expires is None else to_datetime(row.expires),
            preview=folder.preview if folder.preview.is_file() else None,
            problem=row.problem,
            is_service_problem=row.is_service_problem,
        )


def _read_image(row: Any, request: GenerationRequest, folder: JobFolder) -> JobImage:
    file = folder.output(row.number, row.attempt)
    return JobImage(
        index=row.number,
        seed=request.seed + row.number,
        width=row.width,
        height=row.height,
        file=file if file.is_file() else None,
    )


def read_task(row: Any, number: int, attempt: int, folder: JobFolder) -> Task:
    """Build the task of one image from the row of its job.

    Raises:
        StoreError: the row is damaged, or an input file is missing.
    """
    with _report_damage():
        request = GenerationRequest.model_validate_json(row.request)
        files = {field: folder.input(field) for field in json.loads(row.files)}
        if files:
            request = request.with_files(files)
        request = request.model_copy(update={"seed": request.seed + number, "num_images": 1})
    if not all(file.is_file() for file in files.values()):
        raise StoreError(MISSING_INPUT)
    return Task(row.id, number, row.owner, request, attempt)


@contextmanager
def _report_damage() -> Iterator[None]:
    """Turn what a row of wrong content causes into a StoreError."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise StoreError(DAMAGED) from error
