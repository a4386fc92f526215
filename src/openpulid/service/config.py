"""What a service offers, where it keeps its files, and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limits import RateLimitItem, parse

from openpulid.errors import OptionError
from openpulid.io.decoding import MAX_PIXELS
from openpulid.io.images import MAX_BYTES
from openpulid.pipelines.request import ModelSelection


def parse_rate(rate: str) -> RateLimitItem:
    """Parse a rate, such as "60/minute".

    Raises:
        OptionError: it is none.
    """
    try:
        return parse(rate)
    except ValueError:
        raise OptionError(f"{rate!r} is not a rate; use one such as 60/minute.") from None


@dataclass(frozen=True)
class Limits:
    """What one request, one API key and all of them may ask for.

    Attributes:
        body_bytes: size of the body of an HTTP request.
        file_bytes: size of one uploaded file.
        pixels: width times height of an uploaded image.
        files: uploaded files of one request.
        images: images of one request.
        steps: sampling steps of an image.
        side: longest side of a generated image in pixels.
        decode_seconds: processor time for decoding one uploaded image.
        jobs_per_key: unfinished jobs of one API key.
        jobs: unfinished jobs in all.
        rate: requests of one API key for images or identities, such as "60/minute".

    Raises:
        OptionError: the rate is none.
    """

    body_bytes: int = MAX_BYTES
    file_bytes: int = MAX_BYTES
    pixels: int = MAX_PIXELS
    files: int = 32
    images: int = 16
    steps: int = 100
    side: int = 2048
    decode_seconds: float = 20.0
    jobs_per_key: int = 100
    jobs: int = 1000
    rate: str = "600/minute"

    def __post_init__(self) -> None:
        parse_rate(self.rate)  # before a model is loaded


@dataclass(frozen=True)
class ServiceConfig:
    """The configuration of a service.

    Attributes:
        data: folder of the jobs, images and identities; only its owner can open it.
        models: the presets that are offered, each with its changes, the default one first.
        limits: what requests may ask for.
        job_seconds: a job and its images are deleted so long after the job has ended.
        identity_seconds: an identity is deleted so long after its creation.
        database: URL of a PostgreSQL database; SQLite in the data folder by default.
        worker: name of the worker of this process; processes with one data folder have different
            ones.
        device: where to compute; the best device by default.
        max_studios: presets, each with one method, that are in memory at once.
        max_batch: the most images that are computed at once.
        signer_files: PEM files of a certificate and its key; every image that is delivered has
            content credentials (C2PA) with their signature.
    """

    data: Path
    models: tuple[ModelSelection, ...] = (ModelSelection(),)
    limits: Limits = field(default_factory=Limits)
    job_seconds: float = 24 * 3600
    identity_seconds: float = 30 * 24 * 3600
    database: str | None = None
    worker: str = "local"
    device: str | None = None
    max_studios: int = 1
    max_batch: int = 4
    signer_files: tuple[Path, Path] | None = None


def select_models(presets: Sequence[str], **changes: Any) -> tuple[ModelSelection, ...]:
    """Return the models of presets.

    Args:
        presets: their names, the default one first.
        changes: fields of `ModelSelection`, for the first one.

    Raises:
        RequestError: a change is none.
    """
    first, *others = presets
    return (
        ModelSelection(preset=first, **changes),
        *(ModelSelection(preset=name) for name in others),
    )
