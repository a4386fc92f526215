"""The backend of the web page: one loaded studio, the last one that was requested."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import torch

from openpulid import Identity, resolve_preset
from openpulid.identity.reference import ReferenceFaces
from openpulid.io.metadata import hash_files, image_name, save_image
from openpulid.pipelines.inputs import RequestInputs, open_inputs
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, ModelSelection

if TYPE_CHECKING:
    from PIL import Image

    from openpulid.identity.extractor import IdentityExtractor
    from openpulid.pipelines.presets import Preset
    from openpulid.pipelines.studio import GenerationResult, Studio


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
            device = torch.device(self.device) if self.device else None
            self._extractor = (preset.selection, load_extractor(preset, device))
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
        hashes = hash_files(request.input_files())
        inputs = self._open_inputs(request, hashes, models)
        studio = self.studio(models)
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
        return ReferenceFaces.detect(self.extractor(models), images).draw(face_index)

    def _open_inputs(
        self, request: GenerationRequest, hashes: Mapping[str, str], models: ModelSelection
    ) -> RequestInputs:
        """Open the inputs of a request. The same reference images are only analyzed once."""
        images = tuple(value for name, value in hashes.items() if ".images." in name)
        if not images:
            return open_inputs(request)
        person = request.people[0]
        key = (self.preset(models).selection, images, person.face_index, person.face_order)
        inputs = open_inputs(request, self._identities.get(key))
        if inputs.has_reference_images:
            inputs = inputs.with_identities(request, self.extractor(models))
            if len(self._identities) == MAX_IDENTITIES:
                self._identities.popitem(last=False)
            identity = inputs.people[0].identity
            assert isinstance(identity, Identity)
            self._identities[key] = identity
        return inputs

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
