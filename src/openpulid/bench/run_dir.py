"""The run directory of a benchmark, and its contents as typed objects.

RUN/suite.json                        the suite, its subjects and methods
RUN/people/NAME.png                   reference image of a subject; NAME-other.png: a second image
RUN/samples/METHOD/NAME-P-S.json      record of prompt P and seed S: status, metrics, provenance
RUN/samples/METHOD/NAME-P-S.png       its image
RUN/tuned/METHOD/*/NAME.safetensors   a method that was tuned on a subject
RUN/tuned/class-images.safetensors    images for prior preservation, of all subjects and methods
RUN/method_metrics.json               metrics of all images of a method together
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image, ImageChops
from pydantic import ConfigDict, Field, FiniteFloat

from openpulid.bench.files import parse_json, read_json
from openpulid.bench.suite import STRICT, Seed, Suite, check_suite
from openpulid.errors import OptionError
from openpulid.io.files import make_folder, write_json
from openpulid.io.images import open_image
from openpulid.io.lock import lock_directory
from openpulid.io.metadata import save_image

logger = logging.getLogger(__name__)

REPORT_FILES = ("report.md", "report.json", "report.html", "report.png", "faces.jpg")
"""Files of the report in a run directory."""

BASE = "base"
"""The base model without an identity, which every method is compared with."""

MethodMetrics = Mapping[str, "float | None"]
"""Metric name -> value for all images of a method; None where it is undefined."""

Amount = Annotated[float, Field(ge=0)]
Name = Annotated[str, Field(min_length=1, pattern=r"^[^/\x00]+$")]
"""Part of a path."""


@dataclass(frozen=True)
class Subject:
    """A person of the benchmark.

    Attributes:
        name: unique within the run.
        portrait: the reference image.
        other: a second image of the person that no method sees, or None.
    """

    name: str
    portrait: Image.Image
    other: Image.Image | None = None


@dataclass(frozen=True)
class SampleKey:
    """Identifies one image of a run.

    Attributes:
        method: name of the method.
        person: name of the subject.
        prompt: index of the prompt.
        seed: seed of the noise.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    method: Name
    person: Name
    prompt: Annotated[int, Field(ge=0)]
    seed: Seed

    @property
    def stem(self) -> str:
        """The path of its files below RUN/samples, without suffix."""
        return f"{self.method}/{self.person}-{self.prompt}-{self.seed}"

    def with_method(self, method: str) -> SampleKey:
        """Return the key of the same subject, prompt and seed for another method."""
        return SampleKey(method, self.person, self.prompt, self.seed)


@dataclass(frozen=True)
class Job:
    """Images of one method and subject: all seeds of a prompt, or a batch of the suite's size.

    They are generated together, so that an image does not depend on how jobs are distributed.
    """

    keys: tuple[SampleKey, ...]


@dataclass(frozen=True)
class Record:
    """How an image was generated, and its metrics.

    Attributes:
        sample: the image.
        status: "done", or "failed" with an `error`.
        configuration: options and hashes of weights; the image is generated again if they change.
        hardware: name of the device.
        versions: library -> version.
        start: identifies the start of the command; times of different starts are not compared.
        seconds: generation time of one image, mean over its job.
        identify_seconds: time to extract the identity, or to tune the method on the subject.
        identity_bytes: size of the identity, or of the tuned file.
        memory: peak GiB with all methods of the run loaded; None if unknown.
        error: why the image is missing.
        metrics: metric name -> value; None where it is undefined.
        attributes: requested attribute -> whether the image shows it; None before it is checked.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    sample: SampleKey
    status: Literal["done", "failed"]
    configuration: Mapping[str, Any]
    hardware: str
    versions: Mapping[str, str]
    start: str | None = None
    seconds: Amount | None = None
    identify_seconds: Amount | None = None
    identity_bytes: Annotated[int, Field(ge=0)] | None = None
    memory: Amount | None = None
    error: str | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    attributes: Mapping[str, bool] | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Record:
        """Build a record from the data of its file.

        Raises:
            OptionError: a field is unknown, missing or of another type.
        """
        return parse_json(cls, json.dumps(dict(data)))

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON data."""
        return asdict(self)

    @property
    def is_done(self) -> bool:
        """Whether the image was generated."""
        return self.status == "done"


@dataclass(frozen=True)
class RunHeader:
    """The file suite.json: what belongs to a run.

    Attributes:
        suite: the suite.
        people: names of the subjects.
        methods: names of the methods, the base first.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    suite: Suite
    people: Annotated[list[Name], Field(min_length=1)]
    methods: Annotated[list[Name], Field(min_length=1)]


@dataclass(frozen=True)
class Run:
    """The contents of a run directory, read once.

    Attributes:
        path: the run directory.
        suite: the suite of the run.
        people: names of the subjects.
        methods: names of the methods, the base first.
        records: of all images that were tried.
        images: the images that exist.
        method_metrics: method -> metrics of all its images together.
    """

    path: Path
    suite: Suite
    people: Sequence[str]
    methods: Sequence[str]
    records: Mapping[SampleKey, Record]
    images: Mapping[SampleKey, Path]
    method_metrics: Mapping[str, MethodMetrics]

    def keys(self, method: str) -> list[SampleKey]:
        """Return all images of a method, in the same order for every method."""
        return [
            SampleKey(method, person, prompt, seed)
            for person in self.people
            for prompt in self.suite.prompts_of(person)
            for seed in self.seeds(person)
        ]

    def seeds(self, person: str) -> list[int]:
        """Return the seeds of a subject."""
        return self.suite.seeds_of(self.people.index(person))

    def is_comparable(self, key: SampleKey) -> bool:
        """Return whether an image and the base's image of the same prompt and seed exist."""
        return key in self.images and key.with_method(BASE) in self.images

    def portrait(self, person: str) -> Path:
        """Return the path of a subject's reference image."""
        return _portrait_path(self.path, person)

    def second_image(self, person: str) -> Path:
        """Return the path of a subject's second image, which may not exist."""
        return _portrait_path(self.path, f"{person}-other")


class RunDir:
    """A run directory: creates it, writes records and loads everything as a `Run`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lock(self) -> AbstractContextManager[None]:
        """Reserve the directory for this process; raises as `lock_directory`."""
        return lock_directory(self.path)

    def create(self, suite: Suite, methods: Sequence[str], subjects: Sequence[Subject]) -> None:
        """Write the suite and the subjects, or add methods to an existing run.

        Raises:
            OptionError: the directory contains a run of another suite or of other subjects, or
                files of another origin that the report would replace.
        """
        people = [subject.name for subject in subjects]
        all_methods = list(methods)
        if self._header_path.is_file():
            existing = self._read_header()
            # published values do not change any image
            stored = replace(existing.suite, published={})
            current = replace(suite, published={})
            if stored.to_json() != current.to_json() or existing.people != people:
                raise OptionError(
                    f"{self.path} contains another suite or other people; "
                    "choose another directory with -o."
                )
            new_methods = [name for name in methods if name not in existing.methods]
            all_methods = existing.methods + new_methods
        elif others := [name for name in REPORT_FILES if (self.path / name).exists()]:
            raise OptionError(
                f"{self.path} contains no run, but a file {others[0]} that the report would "
                "replace; choose another directory with -o."
            )
        for subject in subjects:
            self._write_portrait(subject.name, subject.portrait)
            if subject.other is not None:
                self._write_portrait(f"{subject.name}-other", subject.other)
        header = {"suite": suite.to_json(), "people": people, "methods": all_methods}
        write_json(self._header_path, header)

    @property
    def _header_path(self) -> Path:
        return self.path / "suite.json"

    def _read_header(self) -> RunHeader:
        path = self._header_path
        header = read_json(RunHeader, path, "choose another directory with -o.")
        check_suite(header.suite, path)
        for name in (*header.people, *header.methods):
            if name in (".", ".."):
                raise OptionError(f"{path}: {name} is not the name of a person or method.")
        return header

    def _write_portrait(self, name: str, image: Image.Image) -> None:
        path = _portrait_path(self.path, name)
        if not path.is_file():
            make_folder(path.parent)
            save_image(image, path, source_type=None)  # perhaps a photo
            return
        stored = open_image(path)
        current = image.convert("RGB")
        if stored.size != current.size or ImageChops.difference(stored, current).getbbox():
            raise OptionError(
                f"{path} differs from the image given now; choose another directory with -o."
            )

    def load(self) -> Run:
        """Read the whole run.

        Raises:
            OptionError: the directory contains no run, or one of its files is damaged or missing.
        """
        if not self._header_path.is_file():
            raise OptionError(
                f"{self.path} contains no run; create one with "
                f"`pulid bench run SUITE -o {self.path}`."
            )
        header = self._read_header()
        run = Run(self.path, header.suite, header.people, header.methods, {}, {}, {})
        for person in run.people:
            if not run.portrait(person).is_file():
                raise OptionError(
                    f"{run.portrait(person)} is missing; run the same `pulid bench run` again."
                )
        records: dict[SampleKey, Record] = {}
        images: dict[SampleKey, Path] = {}
        for key in (key for method in run.methods for key in run.keys(method)):
            record = self.read_record(key)
            if record is None:
                continue
            records[key] = record
            if record.is_done and self.image_path(key).is_file():
                images[key] = self.image_path(key)
        return replace(
            run, records=records, images=images, method_metrics=self.read_method_metrics()
        )

    def read_record(self, key: SampleKey) -> Record | None:
        """Read the record of an image; None before it was tried.

        Raises:
            OptionError: the file is damaged.
        """
        path = self._record_path(key)
        if not path.is_file():
            return None
        advice = "delete it, and `pulid bench run` generates the image again."
        record = read_json(Record, path, advice)
        if record.sample != key:
            raise OptionError(f"{path} is the record of another image; {advice}")
        if record.is_done and not _has_costs(record):
            raise OptionError(f"{path} lacks the time or the steps of its image; {advice}")
        return record

    def write_record(self, record: Record, image: Image.Image | None = None) -> None:
        """Write a record, after its image: a record states that the image exists."""
        if image is not None:
            path = self.image_path(record.sample)
            make_folder(path.parent)
            save_image(image, path)
        write_json(self._record_path(record.sample), record.to_json())

    def image_path(self, key: SampleKey) -> Path:
        """Return the path of an image."""
        return self.path / "samples" / f"{key.stem}.png"

    def tuned_path(self, method: str) -> Path:
        """Return the folder of the files that a method tunes on the subjects."""
        return self.path / "tuned" / method

    def _record_path(self, key: SampleKey) -> Path:
        return self.path / "samples" / f"{key.stem}.json"

    def is_done(self, key: SampleKey, configuration: Mapping[str, Any]) -> bool:
        """Return whether an image exists and was generated with this configuration."""
        try:
            record = self.read_record(key)
        except OptionError as error:
            logger.warning("%s", error)
            return False
        return (
            record is not None
            and record.is_done
            and record.configuration == configuration
            and self.image_path(key).is_file()
        )

    def read_method_metrics(self) -> dict[str, MethodMetrics]:
        """Read the metrics of whole methods that have been computed so far."""
        path = self.path / "method_metrics.json"
        if not path.is_file():
            return {}
        metrics = read_json(
            dict[str, dict[str, FiniteFloat | None]],
            path,
            "delete it, and `pulid bench report` computes it again.",
        )
        return {**metrics}

    def write_method_metrics(self, metrics: Mapping[str, MethodMetrics]) -> None:
        """Write the metrics of whole methods."""
        write_json(self.path / "method_metrics.json", metrics)


def _has_costs(record: Record) -> bool:
    """Return whether a record has what the table computes with."""
    steps = record.configuration.get("num_inference_steps")
    scale = record.configuration.get("scale", 0.0)
    return (
        record.seconds is not None
        and type(steps) is int
        and type(scale) in (int, float)
        and math.isfinite(scale)
    )


def iterate_jobs(suite: Suite, methods: Sequence[str], people: Sequence[str]) -> Iterator[Job]:
    """Yield all jobs of a run, methods interleaved.

    A machine that is slow for a while then slows down every method alike. Rows at extra scales come
    after those of all methods: several workers then tune different methods, and none waits for the
    file that another one tunes.
    """
    methods = sorted(methods, key=lambda method: "@" in method)
    for index, person in enumerate(people):
        images = list(product(suite.prompts_of(person), suite.seeds_of(index)))
        size = suite.batch_size if suite.batch_size > 1 else len(suite.seeds)
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            for method in methods:
                yield Job(tuple(SampleKey(method, person, *image) for image in batch))


def _portrait_path(directory: Path, name: str) -> Path:
    return directory / "people" / f"{name}.png"
