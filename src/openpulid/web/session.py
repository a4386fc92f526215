"""The backend of the web page: one loaded studio, the last one that was requested."""

from __future__ import annotations

import html
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from openpulid.io.metadata import hash_files, image_name, save_image
from openpulid.pipelines.inputs import open_inputs
from openpulid.pipelines.prompts import check_words
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.pipelines.selection import resolve_preset

if TYPE_CHECKING:
    from PIL import Image

    from openpulid.pipelines.presets import Preset
    from openpulid.pipelines.studio import GenerationResult, Studio


class WebSession:
    """Runs the requests of the page, with one studio at a time.

    Args:
        directory: where images are written for the browser.
        device: where to compute.
        models: the preset that is selected first, with its changes.
    """

    def __init__(
        self,
        directory: Path,
        device: str | None = None,
        models: ModelSelection | None = None,
    ) -> None:
        self.directory = directory
        self.device = device
        self.models = models or ModelSelection()
        self._studio: Studio | None = None
        self._presets: dict[ModelSelection, Preset] = {}

    def select_models(self, preset: str, method: str = "pulid") -> ModelSelection:
        """Return the models of a preset and a method.

        The changes of the first preset apply to that preset alone, and its adapter to PuLID alone.
        """
        models = self.models if preset == self.models.preset else ModelSelection(preset=preset)
        if method == "pulid":
            return models
        return models.model_copy(update={"method": method, "adapter": None})

    def preset(self, models: ModelSelection) -> Preset:
        """Resolve the models of a request, once: an insightface pack is opened for it.

        Raises:
            OptionError: see `resolve_preset`.
        """
        if models not in self._presets:
            self._presets[models] = resolve_preset(models)
        return self._presets[models]

    def studio(self, models: ModelSelection) -> Studio:
        """Load the studio of these models, unless it is loaded already.

        The previous one is dropped first: two may not fit into memory.
        """
        from openpulid.pipelines.studio import load

        preset = self.preset(models)
        if self._studio is None or self._studio.preset.selection != preset.selection:
            self._studio = None
            self._studio = load(preset, device=self.device)
        return self._studio

    def generate(
        self, request: GenerationRequest, also_without_identity: bool = False
    ) -> list[tuple[str, str]]:
        """Generate the images of a request.

        Args:
            request: the request; its input files are uploads.
            also_without_identity: generate every image a second time, with the same seed and
                without the person.

        Returns:
            file and caption of each image.
        """
        models = request.model or self.models
        preset = self.preset(models)
        check_words(preset, preset.resolve(request))  # before anything is loaded
        inputs = open_inputs(request)
        studio = self.studio(models)
        hashes = hash_files(request.input_files())
        result = studio.generate(request, inputs=inputs)
        caption = "" if request.people else ", no identity"
        files = self._save(result, hashes, caption)
        if not request.people or not also_without_identity:
            return files
        without = studio.generate(request.without_people(), inputs=replace(inputs, people=()))
        hashes = {name: value for name, value in hashes.items() if not name.startswith("people.")}
        plain_files = self._save(without, hashes, ", no identity")
        return [file for pair in zip(files, plain_files, strict=True) for file in pair]

    def preview(
        self, images: Sequence[str], face_index: int | None, models: ModelSelection
    ) -> Image.Image:
        """Draw the detected faces and the extractor's crops."""
        return self.studio(models).detect(images).draw(face_index)

    def _save(
        self, result: GenerationResult, hashes: dict[str, str], caption: str
    ) -> list[tuple[str, str]]:
        directory = Path(mkdtemp(dir=self.directory))
        files = []
        for image, request in zip(result.images, result.requests, strict=True):
            path = directory / image_name(request.prompt, request.seed)
            provenance = Provenance(request=request, input_hashes=hashes)
            save_image(image, path, provenance.to_metadata(hide_directories=True))
            files.append((str(path), f"seed {request.seed}{caption}"))
        return files


class NoteHandler(logging.Handler):
    """Passes the warnings of one thread to a function.

    Args:
        show: shows one note.
    """

    def __init__(self, show: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self.show = show
        self.thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        """Show a record of this handler's thread: others belong to other visitors."""
        if record.thread == self.thread:
            self.show(html.escape(record.getMessage()))


@contextmanager
def show_notes(show: Callable[[str], object]) -> Iterator[None]:
    """Show notes of the package, such as on options without effect, while the context is open.

    Args:
        show: shows one note, as `gradio.Warning`.
    """
    logger = logging.getLogger("openpulid")
    handler = NoteHandler(show)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
