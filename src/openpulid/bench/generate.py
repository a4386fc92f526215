"""Generate the images of a run: every method with the same subjects, prompts and seeds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

from PIL import Image

from openpulid.bench.configuration import describe_configuration
from openpulid.bench.run_dir import BASE, Job, Record, RunDir, SampleKey, Subject, iterate_jobs
from openpulid.bench.suite import Suite
from openpulid.bench.tuned import SubjectTuner, TunedPreset
from openpulid.device import hardware_name, peak_memory, reset_peak_memory, synchronize
from openpulid.errors import PulidError, explain_out_of_memory
from openpulid.identity.identity import Identity
from openpulid.pipelines.factory import load_adapter
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.studio import Studio

LIBRARIES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class PreparedSubject:
    """A method that is ready to show a subject.

    Attributes:
        person: name of the subject.
        studio: generates images with the method.
        identity: of the subject; None for the base, and for a method that is tuned on the subject.
        seconds: to extract the identity, or to tune.
        num_bytes: of the identity, or of the tuned file.
    """

    person: str
    studio: Studio
    identity: Identity | None = None
    seconds: float = 0.0
    num_bytes: int = 0


class Worker:
    """Generates jobs with several methods on one base model.

    Args:
        suite: the suite.
        studios: method -> studio; the base's has no adapter and comes first.
        subjects: the subjects.
        run_dir: where images and records are written.
        start: the same for all workers of one start of the command.
    """

    def __init__(
        self,
        suite: Suite,
        studios: Mapping[str, Studio],
        subjects: Sequence[Subject],
        run_dir: RunDir,
        start: str | None = None,
    ) -> None:
        self.suite = suite
        self.studios = studios
        self.subjects = {subject.name: subject for subject in subjects}
        self.run_dir = run_dir
        self.start = start
        # hash the files as they were loaded: replacing one later does not change the images
        self._configurations = {
            name: describe_configuration(name, studio.preset, suite.options)
            for name, studio in studios.items()
        }
        self._tuner: SubjectTuner | None = None
        self._prepared: dict[str, PreparedSubject] = {}
        # (method without @SCALE, person) -> why the preparation failed
        self._failures: dict[tuple[str, str], Exception] = {}

    def generate(self, job: Job) -> None:
        """Generate the images of a job and write their records; record failures as well.

        If a batch fails, its images are generated one at a time: the others do not fail with one.
        """
        try:
            with explain_out_of_memory():
                images, costs = self._generate_images(job)
        except Exception as error:  # any failure is a result; the other images are still needed
            message = str(error)
            if not isinstance(error, PulidError):
                message = f"{type(error).__name__}: {message}"
        else:
            for key, image in zip(job.keys, images, strict=True):
                record = Record(key, "done", **costs, **self._describe(key.method))
                self.run_dir.write_record(record, image)
            return
        # after the except clause: the exception would keep the tensors of the batch alive
        if len(job.keys) > 1:
            for key in job.keys:
                self.generate(Job((key,)))
            return
        key = job.keys[0]
        self.run_dir.write_record(
            Record(key, "failed", error=message, **self._describe(key.method))
        )

    def _generate_images(self, job: Job) -> tuple[list[Image.Image], dict[str, Any]]:
        """Return the images of a job with their time and memory, as fields of `Record`."""
        first = job.keys[0]
        prepared = self._prepare(first)
        studio = prepared.studio
        device = studio.pipe.device
        studio.adapter.attach(studio.pipe)  # the methods share a pipeline; the last one is used

        reset_peak_memory(device)
        start = time.perf_counter()
        images = self._run(prepared, job.keys)
        synchronize(device)
        seconds = (time.perf_counter() - start) / len(job.keys)
        costs = {
            "seconds": round(seconds, 4),
            "identify_seconds": round(prepared.seconds, 4),
            "identity_bytes": prepared.num_bytes,
            "memory": peak_memory(device),
        }
        return images, costs

    def _run(self, prepared: PreparedSubject, keys: Sequence[SampleKey]) -> list[Image.Image]:
        """Generate images one after the other, or at once if the suite has batches."""
        studio, identity, options = prepared.studio, prepared.identity, self.suite.options
        rows = [(self.suite.prompts[key.prompt].text, key.seed) for key in keys]
        if self.suite.batch_size == 1:
            results = [
                studio.generate(prompt, identity, seed=seed, **options) for prompt, seed in rows
            ]
        else:
            requests = [
                GenerationRequest.from_options(prompt=prompt, seed=seed, **options)
                for prompt, seed in rows
            ]
            results = studio.generate_batch(requests, identity)
        return [result.images[0] for result in results]

    def _prepare(self, key: SampleKey) -> PreparedSubject:
        """Prepare a method for a subject; the last subject of each method is kept.

        A preparation that failed is not tried again, for another prompt or scale: a tuning may take
        minutes.
        """
        prepared = self._prepared.get(key.method)
        if prepared is not None and prepared.person == key.person:
            return prepared
        attempt = (key.method.partition("@")[0], key.person)
        if attempt in self._failures:
            raise self._failures[attempt]
        try:
            prepared = self._prepare_subject(key.method, self.subjects[key.person])
        except Exception as error:
            self._failures[attempt] = error.with_traceback(None)  # it would keep tensors alive
            raise
        self._prepared[key.method] = prepared
        return prepared

    def _prepare_subject(self, method: str, subject: Subject) -> PreparedSubject:
        """Extract the identity of a subject, or tune the method on the subject."""
        studio = self.studios[method]
        if method == BASE:
            return PreparedSubject(subject.name, studio)
        device = studio.pipe.device
        if isinstance(studio.preset, TunedPreset):
            folder = self.run_dir.tuned_path(studio.preset.recipe.method)
            self._tuner = self._tuner or SubjectTuner(device)
            preset, seconds, num_bytes = self._tuner.tune(
                studio.preset, subject, folder, self._configurations[method]
            )
            adapter = load_adapter(preset, device)
            tuned = Studio(studio.pipe, adapter, studio.extractor, preset)
            return PreparedSubject(subject.name, tuned, None, seconds, num_bytes)
        start = time.perf_counter()
        identity = studio.identify(subject.portrait)
        synchronize(device)
        seconds = time.perf_counter() - start
        return PreparedSubject(subject.name, studio, identity, seconds, identity.num_bytes)

    def _describe(self, method: str) -> dict[str, Any]:
        return {
            "configuration": self._configurations[method],
            "hardware": hardware_name(self.studios[method].pipe.device),
            "versions": {name: version(name) for name in LIBRARIES},
            "start": self.start,
        }


Executor = Callable[[Iterable[Job]], Iterable[Job]]
"""Runs jobs, in any process, and yields each job when it is complete."""


class Progress(Protocol):
    """Reports the progress of a run."""

    def __call__(self, done: int, total: int) -> None:
        """Report that `done` of `total` jobs are complete."""


def generate_run(
    suite: Suite,
    presets: Mapping[str, Preset],
    subjects: Sequence[Subject],
    run_dir: RunDir,
    executor: Executor,
    on_progress: Progress | None = None,
) -> None:
    """Generate every image that is missing or was generated with another configuration.

    Args:
        suite: the suite.
        presets: method -> preset, the base first.
        subjects: the subjects.
        run_dir: where images and records are written.
        executor: runs the jobs.
        on_progress: called after each job.
    """
    configurations = {
        method: describe_configuration(method, preset, suite.options)
        for method, preset in presets.items()
    }
    # create the directory after that: a method whose file is missing is not added to the run
    run_dir.create(suite, list(presets), subjects)
    jobs = list(iterate_jobs(suite, list(presets), [subject.name for subject in subjects]))
    missing = [
        job
        for job in jobs
        if not all(run_dir.is_done(key, configurations[key.method]) for key in job.keys)
    ]
    for done, _ in enumerate(executor(missing), len(jobs) - len(missing) + 1):
        if on_progress:
            on_progress(done, len(jobs))


def local_executor(worker: Worker) -> Executor:
    """Return an executor that runs jobs one after the other in this process."""

    def execute(jobs: Iterable[Job]) -> Iterable[Job]:
        for job in jobs:
            worker.generate(job)
            yield job

    return execute
