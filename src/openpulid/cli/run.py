"""Run the requests of `pulid generate`, and write each image as soon as it exists."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openpulid.cli.options import print_path

if TYPE_CHECKING:
    from PIL.Image import Image

    from openpulid.io.content_credentials import ContentSigner
    from openpulid.pipelines.controls import ControlNetFiles
    from openpulid.pipelines.grid import Grid
    from openpulid.pipelines.inputs import RequestInputs
    from openpulid.pipelines.presets import Preset
    from openpulid.pipelines.progress import Preview
    from openpulid.pipelines.request import GenerationRequest, ModelSelection

logger = logging.getLogger(__name__)

SHEET_SIDE = 384
"""Longest side of an image on the sheet of a grid, in pixels."""


@dataclass(frozen=True)
class ImageOutput:
    """Where and how images are written.

    Attributes:
        folder: exists.
        name: pattern of the file names; by default the prompt and the seed.
        metadata: whether to store the request in each image.
        signer: adds content credentials.
    """

    folder: Path
    name: str | None = None
    metadata: bool = True
    signer: ContentSigner | None = None

    def __post_init__(self) -> None:
        if self.name is not None:
            from openpulid.pipelines.file_names import check_pattern

            check_pattern(self.name)

    def check_name(self, request: GenerationRequest) -> None:
        """Check the name of an image before it is generated, see `file_names.image_name`."""
        from openpulid.pipelines.file_names import DEFAULT_PATTERN, image_name

        image_name(request, self.name or DEFAULT_PATTERN)

    def save(self, image: Image, request: GenerationRequest, inputs: RequestInputs) -> Path:
        """Write one image."""
        from openpulid.pipelines.file_names import DEFAULT_PATTERN
        from openpulid.pipelines.result import save_generated

        return save_generated(
            image,
            request,
            self.folder,
            inputs.fingerprints,
            name=self.name or DEFAULT_PATTERN,
            metadata=self.metadata,
            signer=self.signer,
        )

    def save_sheet(self, sheet: Image, request: GenerationRequest) -> Path:
        """Write the sheet of a grid.

        Args:
            sheet: the sheet.
            request: one of its images'.
        """
        from openpulid.io.files import write_new
        from openpulid.pipelines.file_names import image_name
        from openpulid.pipelines.result import encode_generated

        content = encode_generated(sheet, request, signer=self.signer)
        return write_new(self.folder / f"grid-{image_name(request)}", content)


class ProgressBar:
    """A bar on stderr with the steps of the current image, and the time left for it.

    Args:
        num_images: how many images.
    """

    def __init__(self, num_images: int) -> None:
        self._num_images = num_images
        self._num_done = 0
        self._images_left = num_images  # of the request
        self._steps_per_image: int | None = None
        self._first_step = self._last_step = 0
        self._bar: Any = None

    def show_step(self, step: int, total: int, preview: Preview) -> None:
        """Show a step; this is the callback of a generation."""
        if not sys.stderr.isatty():
            return
        if self._steps_per_image is None:
            self._steps_per_image = total // self._images_left
        # the total grows with each face that is refined
        later_steps = (self._images_left - 1) * self._steps_per_image
        steps = total - self._first_step - later_steps
        if self._bar is None:
            self._bar = self._create(steps)
        self._bar.update(0, completed=step - self._first_step, total=steps, refresh=True)
        self._last_step = step

    def finish_image(self) -> None:
        """Remove the bar of an image that is done."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._first_step = self._last_step
        self._num_done += 1
        self._images_left -= 1

    def start_request(self, num_images: int) -> None:
        """Note that the next step is the first one of another request.

        Args:
            num_images: of the request.
        """
        self._images_left = num_images
        self._steps_per_image = None
        self._first_step = 0

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def _create(self, num_steps: int) -> Any:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = (BarColumn(), MofNCompleteColumn(), "steps", TimeRemainingColumn())
        text = f"image {self._num_done + 1} of {self._num_images}"
        # paths go to stdout as they are
        console = Console(stderr=True)
        bar = Progress(
            text,
            *columns,
            console=console,
            auto_refresh=False,  # each step is drawn when it is done
            transient=True,
            redirect_stdout=False,
        )
        bar.add_task("", total=num_steps)
        bar.start()
        return bar


def run_request(
    request: GenerationRequest, output: ImageOutput, device: str | None, note: str | None = None
) -> None:
    """Generate the images of a request.

    Args:
        request: the request.
        output: where the images are written.
        device: where to compute; the best device by default.
        note: logged as a warning before the images are generated, if there is no error.

    Raises:
        PulidError: see `Studio.generate`. What does not need the models is checked before they
            are loaded.
    """
    run_requests([request], output, device, note)


def run_grid_requests(
    grid: Grid,
    requests: Sequence[GenerationRequest],
    output: ImageOutput,
    device: str | None,
    note: str | None = None,
) -> None:
    """Generate the images of a grid, then write its sheet.

    Args:
        grid: the grid.
        requests: one per cell.
        output: where the images and the sheet are written.
        device: where to compute; the best device by default.
        note: logged as a warning before the images are generated, if there is no error.
    """
    cells = run_requests(requests, output, device, note)
    print_path(output.save_sheet(grid.draw(requests, cells, SHEET_SIDE), requests[0]))


def run_requests(
    requests: Sequence[GenerationRequest],
    output: ImageOutput,
    device: str | None,
    note: str | None = None,
) -> list[list[Image]]:
    """Generate the images of several requests; those with the same models share a studio.

    Args:
        requests: the requests.
        output: where the images are written.
        device: where to compute; the best device by default.
        note: logged as a warning before the images are generated, if there is no error.

    Returns:
        The images of each request.
    """
    jobs = _open_jobs(requests, output)
    if all(job.preset.models.has_own_person for job in jobs):
        note = None  # about a person that is missing
    images: list[list[Image]] = [[] for _ in requests]
    bar = ProgressBar(sum(request.num_images for request in requests))
    with _report_interruption(images, sum(request.num_images for request in requests)):
        for models in dict.fromkeys(request.model for request in requests):
            same = [k for k, request in enumerate(requests) if request.model == models]
            _run_jobs([jobs[k] for k in same], [images[k] for k in same], output, device, bar, note)
            note = None
    return images


@dataclass
class _Job:
    """A request that is checked, and its files."""

    request: GenerationRequest
    preset: Preset
    inputs: RequestInputs


def _open_jobs(requests: Sequence[GenerationRequest], output: ImageOutput) -> list[_Job]:
    """Check all requests and open their files, before any model is loaded."""
    from openpulid import resolve_preset
    from openpulid.pipelines import factory
    from openpulid.pipelines.inputs import open_inputs
    from openpulid.pipelines.prompts import check_words

    presets: dict[ModelSelection, Preset] = {}
    jobs = []
    for request in requests:
        assert request.model is not None
        if request.model not in presets:
            presets[request.model] = resolve_preset(request.model)
        preset = presets[request.model]
        resolved = preset.resolve(request)
        size = resolved.image_size(preset.models.native_side)
        output.check_name(resolved.for_image(resolved.seed, *size))
        check_words(preset, resolved)
        inputs = open_inputs(request, preset.models)
        inputs.check(preset.models)
        factory.check_models(preset, inputs.identities)
        jobs.append(_Job(request, preset, inputs))
    return jobs


def _run_jobs(
    jobs: Sequence[_Job],
    images: Sequence[list[Image]],
    output: ImageOutput,
    device: str | None,
    bar: ProgressBar,
    note: str | None,
) -> None:
    """Run jobs with the same models, and append their images to lists."""
    from openpulid.pipelines.loading import load

    _extract_identities(jobs, device)
    _detect_control_maps(jobs)
    _share_style_adapters(jobs)
    studio = load(jobs[0].preset, device)
    if note is not None:
        logger.warning("%s", note)

    def save(job: _Job, generated: list[Image], image: Image, request: GenerationRequest) -> None:
        path = output.save(image, request, job.inputs)
        generated.append(image)
        bar.finish_image()
        print_path(path)

    try:
        for job, generated in zip(jobs, images, strict=True):
            bar.start_request(job.request.num_images)
            studio.generate(
                job.request,
                inputs=job.inputs,
                on_image=partial(save, job, generated),
                callback=bar.show_step,
            )
    finally:
        bar.stop()


def _extract_identities(jobs: Sequence[_Job], device: str | None) -> None:
    """Replace reference images by identities, before the base model is loaded.

    Without a face the base model is not needed, and with one the face models are freed.
    """
    from openpulid.device import release_memory
    from openpulid.pipelines import factory

    waiting = [job for job in jobs if job.inputs.has_reference_images]
    if not waiting:
        return
    extractor = factory.load_extractor(waiting[0].preset, device)
    known: dict[Any, RequestInputs] = {}
    for job in waiting:
        people = job.request.people
        if people not in known:
            known[people] = job.inputs.with_identities(job.request, extractor)
        job.inputs = replace(job.inputs, people=known[people].people)
    del extractor
    release_memory()


def _detect_control_maps(jobs: Sequence[_Job]) -> None:
    """Detect control images before the base model is loaded; each ControlNet is loaded once."""
    known: dict[Any, RequestInputs] = {}
    files: dict[Path, ControlNetFiles] = {}
    for job in jobs:
        controls = job.request.controls
        if controls not in known:
            inputs = job.inputs.with_control_maps()
            shared = [
                replace(control, files=files.setdefault(control.files.path, control.files))
                for control in inputs.controls
            ]
            known[controls] = replace(inputs, controls=tuple(shared))
        job.inputs = replace(job.inputs, controls=known[controls].controls)


def _share_style_adapters(jobs: Sequence[_Job]) -> None:
    """Let style images share the file of an IP-Adapter, so that each is loaded once."""
    files: dict[Path, Any] = {}
    for job in jobs:
        job.inputs = replace(job.inputs, add_ons=job.inputs.add_ons.share_style(files))


@contextmanager
def _report_interruption(images: Sequence[Sequence[Image]], total: int) -> Iterator[None]:
    """Say how many images are written if the user ends the command."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or SIGTERM
        count = sum(map(len, images))
        print(f"pulid: stopped; {count} of {total} images are written.", file=sys.stderr)
        raise
