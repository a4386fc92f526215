"""The backend of the web page: one loaded studio, the last one that was requested."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from openpulid import Identity, resolve_preset
from openpulid.identity.reference import ReferenceFaces, open_references
from openpulid.io.files import make_folder
from openpulid.io.temporary import private_directory
from openpulid.pipelines.inputs import RequestInputs, open_inputs
from openpulid.pipelines.prompts import check_words
from openpulid.pipelines.provenance import fingerprint_inputs
from openpulid.pipelines.request import GenerationRequest, ModelSelection

if TYPE_CHECKING:
    from PIL import Image

    from openpulid.identity.extractor import IdentityExtractor
    from openpulid.pipelines.presets import Preset
    from openpulid.pipelines.result import GenerationResult
    from openpulid.pipelines.studio import Studio

UPLOAD_VARIABLE = "GRADIO_TEMP_DIR"


DECODE_SECONDS = 20.0
"""Time limit for decoding an upload, in a child process."""


MAX_IDENTITIES = 16
"""Identities of the last reference images, which are kept in memory until the page is closed."""


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
        self._extractor: tuple[ModelSelection, IdentityExtractor] | None = None
        self._identities: OrderedDict[object, Identity] = OrderedDict()
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
            extractor = None
            if self._extractor is not None and self._extractor[0] == preset.selection:
                extractor = self._extractor[1]
            self._extractor = None
            self._studio = load(preset, device=self.device, extractor=extractor)
        return self._studio

    def extractor(self, models: ModelSelection) -> IdentityExtractor:
        """Load the identity extractor of these models, unless it is loaded already.

        The base model is not loaded: that takes minutes, and may be in vain if there is no face.
        """
        from openpulid import load_extractor

        preset = self.preset(models)
        if self._studio is not None and self._studio.preset.selection == preset.selection:
            return self._studio.extractor
        if preset.models.adapter_has_vision_encoder:
            return self.studio(models).extractor  # the adapter is not loaded twice
        if self._extractor is None or self._extractor[0] != preset.selection:
            self._studio = None
            self._extractor = None
            self._extractor = (preset.selection, load_extractor(preset, self.device))
        return self._extractor[1]

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
        inputs = self._open_inputs(request, models)
        inputs.check(preset.models)
        studio = self.studio(models)
        result = studio.generate(request, inputs=inputs)
        caption = "" if request.people else ", no identity"
        files = self._save(result, caption)
        if not request.people or not also_without_identity:
            return files
        without = studio.generate(request.without_people(), inputs=inputs.without_people())
        plain_files = self._save(without, ", no identity")
        return [file for pair in zip(files, plain_files, strict=True) for file in pair]

    def preview(
        self, images: Sequence[str], face_index: int | None, models: ModelSelection
    ) -> Image.Image:
        """Draw the detected faces and the extractor's crops."""
        references = open_references(images, time_limit=DECODE_SECONDS)
        return ReferenceFaces.detect(self.extractor(models), references).draw(face_index)

    def _open_inputs(self, request: GenerationRequest, models: ModelSelection) -> RequestInputs:
        """Open the inputs of a request. The same reference images are only analyzed once."""
        fingerprints = fingerprint_inputs(request)
        images = tuple(value for name, value in fingerprints.items() if ".images." in name)
        if not images:
            return open_inputs(request, time_limit=DECODE_SECONDS)
        person = request.people[0]
        key = (self.preset(models).selection, images, person.face_index, person.face_order)
        inputs = open_inputs(request, self._identities.get(key), DECODE_SECONDS)
        if inputs.has_reference_images:
            inputs = inputs.with_identities(request, self.extractor(models))
            if len(self._identities) == MAX_IDENTITIES:
                self._identities.popitem(last=False)
            identity = inputs.people[0].identity
            assert isinstance(identity, Identity)
            self._identities[key] = identity
        return inputs

    def _save(self, result: GenerationResult, caption: str) -> list[tuple[str, str]]:
        paths = result.save(mkdtemp(dir=self.directory))
        captions = [f"seed {seed}{caption}" for seed in result.seeds]
        return [(str(path), text) for path, text in zip(paths, captions, strict=True)]


@contextmanager
def open_session(device: str | None, models: ModelSelection) -> Iterator[WebSession]:
    """Open a session whose images and uploads are private, and are removed at the end.

    Args:
        device: where to compute.
        models: the preset that is selected first, with its changes.
    """
    with private_directory() as directory, _upload_to(directory / "uploads"):
        yield WebSession(directory, device, models)


@contextmanager
def _upload_to(directory: Path) -> Iterator[None]:
    """Let Gradio store uploads, and its copies of images, in a folder."""
    make_folder(directory)
    previous = os.environ.get(UPLOAD_VARIABLE)
    os.environ[UPLOAD_VARIABLE] = str(directory)
    try:
        yield
    finally:
        del os.environ[UPLOAD_VARIABLE]
        if previous is not None:
            os.environ[UPLOAD_VARIABLE] = previous
