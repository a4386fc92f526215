"""What generates images: the interface, and studios in this process."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from PIL import Image

from openpulid.errors import PulidError, Stopped, StoreError, explain_out_of_memory
from openpulid.identity.extractor import IdentityExtractor
from openpulid.identity.identity import Identity
from openpulid.identity.reference import ReferenceFaces
from openpulid.pipelines.factory import load_extractor
from openpulid.pipelines.inputs import RequestInputs, open_inputs
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import ModelSelection
from openpulid.pipelines.result import GenerationResult, encode_generated
from openpulid.pipelines.selection import resolve_preset
from openpulid.pipelines.studio import Studio
from openpulid.service.jobs import Output, Task

logger = logging.getLogger(__name__)

UNEXPECTED = "the service could not run this job; its administrator finds the reason in the log."
NOT_LOADED = "the models of this preset cannot be loaded now; try again later."
MEMORY_ADVICE = "try a smaller size"

OnStep = Callable[[Sequence[Task], int, int, Callable[[int], Image.Image]], None]
"""Receives the tasks that run together, how many steps of each image are done, how many there are,
and a function that decodes a preview of the task at a position. It can raise `Stopped`."""

Result = Output | PulidError
"""The image of a task, or why there is none."""

Row = tuple[Task, RequestInputs]
"""A task of a batch, and its files."""


class Interrupted(Exception):
    """The process that ran tasks has ended; they can run again."""


class Engine(Protocol):
    """Generates images. Threads can share it."""

    def identify(
        self,
        models: ModelSelection,
        images: Sequence[Path],
        face_index: int | None = None,
        face_order: str = "large-small",
    ) -> Identity:
        """Extract the identity of one person, see `Studio.identify`."""
        ...

    def run(self, tasks: Sequence[Task], on_step: OnStep) -> Iterator[tuple[Task, Result]]:
        """Generate the images of tasks of equal batch key, and yield each as soon as it is there.

        If `on_step` raises `Stopped`, the tasks that it stops have no result.

        Raises:
            Interrupted: the tasks without a result run again later.
        """
        ...


class LocalEngine:
    """Generates images in this process, with one batch at a time.

    Args:
        device: where to compute; the accelerator if there is one, else the CPU.
        max_studios: how many presets, each with one method, are in memory at once. The one that has
            not been used for the longest time is dropped first.
    """

    def __init__(self, device: str | None = None, max_studios: int = 1) -> None:
        self._device = device
        self._max_studios = max_studios
        self._studios: OrderedDict[ModelSelection, Studio] = OrderedDict()
        self._presets: dict[ModelSelection, Preset] = {}
        self._extractor: tuple[ModelSelection, IdentityExtractor] | None = None
        self._extractor_lock = threading.Lock()
        self._studios_lock = threading.Lock()
        # a studio is loaded or dropped only while none runs: two may not fit into memory
        self._device_lock = threading.RLock()

    @property
    def loaded(self) -> list[ModelSelection]:
        """The models in memory, those that were used last at the end."""
        with self._studios_lock:
            return list(self._studios)

    def studio(self, models: ModelSelection) -> Studio:
        """Return the studio of these models; it is loaded now if it is not in memory.

        Raises:
            OptionError: there is no such preset.
            WeightsError: weights are missing or damaged.
        """
        if (studio := self._find(models)) is not None:
            return studio
        with self._device_lock:
            if (studio := self._find(models)) is not None:  # another thread has loaded it
                return studio
            preset = self._preset(models)
            with self._studios_lock:
                while len(self._studios) >= self._max_studios:
                    self._studios.popitem(last=False)
            with self._extractor_lock:
                kept, self._extractor = self._extractor, None
            extractor = kept[1] if kept is not None and kept[0] == preset.selection else None
            with explain_out_of_memory("choose another preset or --memory"):
                studio = load(preset, device=self._device, extractor=extractor)
            with self._studios_lock:
                self._studios[preset.selection] = studio
            return studio

    def identify(
        self,
        models: ModelSelection,
        images: Sequence[Path],
        face_index: int | None = None,
        face_order: str = "large-small",
    ) -> Identity:
        """Extract the identity of one person, see `Studio.identify`.

        This does not wait for the batch that runs, and loads no base model, except for adapters
        that include the vision encoder. The face models are those of a preset in memory, or the
        last that were loaded alone.
        """
        with explain_out_of_memory(MEMORY_ADVICE):
            with _explain_failed_load():
                extractor = self._find_extractor(models)
            return ReferenceFaces.detect(extractor, images).identity(face_index, face_order)

    def run(self, tasks: Sequence[Task], on_step: OnStep) -> Iterator[tuple[Task, Result]]:
        """Generate the images of tasks of equal batch key, see `Engine.run`.

        What is wrong with one task is reported for that task alone.
        """
        with self._device_lock:
            try:
                with _explain_failed_load():
                    studio = self.studio(tasks[0].request.model or ModelSelection())
            except StoreError as error:
                yield from ((task, error) for task in tasks)
                return
            ready: list[Row] = []
            for task in tasks:
                try:
                    ready.append((task, _open_inputs(studio, task)))
                except PulidError as error:
                    yield task, error
            if ready:
                yield from _run_rows(studio, ready, on_step)

    def _find(self, models: ModelSelection) -> Studio | None:
        """Return a studio that is in memory."""
        selection = self._preset(models).selection
        with self._studios_lock:
            if selection in self._studios:
                self._studios.move_to_end(selection)
            return self._studios.get(selection)

    def _find_extractor(self, models: ModelSelection) -> IdentityExtractor:
        preset = self._preset(models)
        if (studio := self._find(models)) is not None:
            return studio.extractor
        if preset.models.adapter_has_vision_encoder:  # it would be loaded twice
            return self.studio(models).extractor
        with self._extractor_lock:
            if self._extractor is None or self._extractor[0] != preset.selection:
                self._extractor = None
                extractor = load_extractor(preset, self._device)
                self._extractor = (preset.selection, extractor)
            return self._extractor[1]

    def _preset(self, models: ModelSelection) -> Preset:
        if models not in self._presets:
            self._presets[models] = resolve_preset(models)
        return self._presets[models]


@contextmanager
def _explain_failed_load() -> Iterator[None]:
    """Log why models cannot be loaded: no client can change it, and the reason names files.

    Raises:
        StoreError: they cannot be loaded.
    """
    try:
        yield
    except PulidError as error:
        logger.error("models cannot be loaded: %s", error)
        raise StoreError(NOT_LOADED) from error


def _open_inputs(studio: Studio, task: Task) -> RequestInputs:
    inputs = open_inputs(task.request, studio.preset.models)
    if not inputs.has_reference_images:
        return inputs
    with explain_out_of_memory(MEMORY_ADVICE):
        return inputs.with_identities(task.request, studio.extractor)


def _run_rows(
    studio: Studio, rows: Sequence[Row], on_step: OnStep
) -> Iterator[tuple[Task, Result]]:
    """Generate rows at once; if that fails, one by one, so that each has its own result."""
    try:
        results = _generate(studio, rows, on_step)
    except Stopped:
        raise
    except Exception as error:
        if len(rows) > 1:
            logger.warning("a batch of %d failed (%s); its images run alone", len(rows), error)
            for row in rows:
                yield from _run_rows(studio, [row], on_step)
        elif isinstance(error, PulidError):
            yield rows[0][0], error
        else:
            logger.exception("unexpected error in %s", rows[0][0].job_id)
            yield rows[0][0], PulidError(UNEXPECTED)
    else:
        yield from results


def _generate(studio: Studio, rows: Sequence[Row], on_step: OnStep) -> list[tuple[Task, Result]]:
    """Generate rows at once. Rows that were stopped have no result."""
    tasks = [task for task, _ in rows]
    inputs = [files for _, files in rows]

    def report(step: int, total: int, preview: Callable[..., Image.Image]) -> None:
        on_step(tasks, step // len(tasks), total // len(tasks), preview)

    with explain_out_of_memory(MEMORY_ADVICE):
        if len(tasks) == 1:
            results = [studio.generate(tasks[0].request, inputs=inputs[0], callback=report)]
        else:
            requests = [task.request for task in tasks]
            results = studio.generate_batch(requests, inputs=inputs, callback=report)
    return [
        (task, _encode(result))
        for task, result in zip(tasks, results, strict=True)
        if result.images
    ]


def _encode(result: GenerationResult) -> Output:
    """Encode the image with its request, as `pulid generate` does."""
    image, request = result.images[0], result.requests[0]
    parameters = Provenance.create(request, result.fingerprints).to_metadata()
    return Output(encode_generated(image, request, parameters), *image.size)
