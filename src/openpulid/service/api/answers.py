"""Jobs and images as the service returns them."""

from __future__ import annotations

from base64 import b64encode
from datetime import datetime
from io import BytesIO
from typing import Literal

from fastapi import Request
from PIL import Image
from pydantic import BaseModel, Field

from openpulid.io.metadata import encode_image
from openpulid.io.xmp import DigitalSourceType
from openpulid.service.api.context import find_context
from openpulid.service.api.fields import AnswerOptions
from openpulid.service.api.problems import RETRY_LATER, Problem, ProblemDetails
from openpulid.service.jobs import Job, JobImage, JobStatus
from openpulid.service.queue.engine import UNEXPECTED

ImageFormat = Literal["png", "jpeg", "webp"]

SUFFIXES: dict[str, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class JobImageAnswer(BaseModel):
    """A finished image of a job."""

    index: int
    seed: int = Field(description="The seed that regenerates this image alone.")
    width: int
    height: int
    url: str


class JobAnswer(BaseModel):
    """A job."""

    id: str
    object: Literal["job"] = "job"
    status: JobStatus
    model: str
    position: int | None = Field(
        description="Images that are served before the first one of this job that waits."
    )
    step: int = Field(description="Steps that are done, of all images together.")
    total_steps: int
    images: list[JobImageAnswer]
    problem: ProblemDetails | None = Field(description="Why the job has failed.")
    created_at: int = Field(description="Seconds since 1970, as all times.")
    started_at: int | None
    finished_at: int | None
    expires_at: int | None = Field(description="When the job and its images are removed.")


class ImageData(BaseModel):
    """One image, as in OpenAI's API."""

    b64_json: str | None = Field(default=None, description="The image file in base64.")
    url: str | None = Field(default=None, description="Its address; it needs the same API key.")
    seed: int = Field(description="The seed that regenerates this image alone.")


class ImagesAnswer(BaseModel):
    """The images of a request, as in OpenAI's API."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: ImageFormat
    size: str
    job: str = Field(description="The job that has generated the images.")


def describe_job(job: Job, position: int | None, request: Request) -> JobAnswer:
    """Return a job for its owner.

    Args:
        job: the job.
        position: see `JobAnswer`.
        request: names the server in the addresses of images.
    """
    images = [
        JobImageAnswer(
            index=image.index,
            seed=image.seed,
            width=image.width,
            height=image.height,
            url=image_url(job, image, request),
        )
        for image in job.images
    ]
    model = job.request.model
    assert model is not None
    return JobAnswer(
        id=job.id,
        status=job.status,
        model=model.preset,
        position=position,
        step=job.step,
        total_steps=job.total_steps,
        images=images,
        problem=None if job.problem is None else to_problem(job).details,
        created_at=int(job.created.timestamp()),
        started_at=_seconds(job.started),
        finished_at=_seconds(job.finished),
        expires_at=_seconds(job.expires),
    )


def to_problem(job: Job) -> Problem:
    """Return why a job has no images; its input files have the names of fields."""
    if job.problem is None:
        return Problem(409, "the job was cancelled before its end.")
    if job.problem == UNEXPECTED:
        return Problem(500, UNEXPECTED)
    sentence = job.problem
    for field, name in job.request.input_files():
        if name.startswith(field.replace(".", "-")):  # it is not a published name
            sentence = sentence.replace(name, field)
    if job.is_service_problem:
        return Problem(503, sentence, headers=RETRY_LATER)
    return Problem(400, sentence)


def require_completed(job: Job) -> None:
    """Check that a job has all its images.

    Raises:
        Problem: it has not.
    """
    if job.status is not JobStatus.COMPLETED:
        raise to_problem(job)


def image_url(
    job: Job, image: JobImage, request: Request, options: AnswerOptions | None = None
) -> str:
    """Return the address of an image on this server."""
    url = request.url_for("get_job_image", job_id=job.id, index=image.index)
    if options is not None and options.output_format != "png":
        url = url.include_query_params(format=options.output_format)
        if options.output_compression is not None:
            url = url.include_query_params(compression=options.output_compression)
    return str(url)


def describe_images(job: Job, options: AnswerOptions, request: Request) -> ImagesAnswer:
    """Return the images of a job that has ended.

    Raises:
        Problem: the job has failed, or its images are removed.
    """
    require_completed(job)
    first = job.images[0]
    data = []
    for image in job.images:
        if options.response_format == "url":
            data.append(ImageData(url=image_url(job, image, request, options), seed=image.seed))
        else:
            content = b64encode(read_image(job, image, options, request)).decode()
            data.append(ImageData(b64_json=content, seed=image.seed))
    return ImagesAnswer(
        created=int(job.created.timestamp()),
        data=data,
        output_format=options.output_format,
        size=f"{first.width}x{first.height}",
        job=job.id,
    )


def read_image(job: Job, image: JobImage, options: AnswerOptions, request: Request) -> bytes:
    """Return the content of an image file. A PNG file carries its request; no other does.

    A service with a signer signs every file when it is delivered, after its conversion.

    Raises:
        Problem: the image is removed (404).
    """
    try:
        if image.file is None:
            raise FileNotFoundError
        content = image.file.read_bytes()
    except FileNotFoundError:
        raise Problem(404, f"image {image.index} of this job is removed.") from None
    suffix = SUFFIXES[options.output_format]
    is_edited = job.request.init_image is not None
    source_type = DigitalSourceType.EDITED if is_edited else DigitalSourceType.GENERATED
    if options.output_format != "png":
        content = encode_image(
            Image.open(BytesIO(content)),
            suffix,
            source_type=source_type,
            quality=options.output_compression,
        )
    signer = find_context(request).signer
    return content if signer is None else signer.sign(content, suffix, source_type)


def _seconds(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp())
