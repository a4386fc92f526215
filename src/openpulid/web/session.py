"""The backend of the web page: one loaded studio, the last one that was requested."""

from __future__ import annotations

import shutil
import time
from collections import OrderedDict, deque
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from openpulid import Identity, resolve_preset
from openpulid.pipelines.request import ModelSelection
from openpulid.pipelines.weights import (
    find_installed_methods,
    find_installed_presets,
)
from openpulid.web.history import UPLOADS, History

if TYPE_CHECKING:
    from openpulid.identity.extractor import IdentityExtractor
    from openpulid.io.content_credentials import ContentSigner
    from openpulid.pipelines.presets import Preset
    from openpulid.pipelines.studio import Studio

KEPT_SECONDS = 3600
"""Time for which files are kept: uploads, and generated images without a history."""
RUN_PREFIX = "run-"
MAX_JOBS = 256
"""Names of calls that are remembered: of those that have begun, and of those that are stopped."""


class WebSession:
    """Runs the requests of the page, with one studio at a time.

    Args:
        directory: where images are written for the browser.
        device: where to compute.
        models: the preset that is selected first, with its changes.
        has_history: whether visitors can see again what they have generated.
        allow_paths: whether visitors may name folders and files of this machine as weights.
        signer: adds signed content credentials (C2PA) to generated images.

    Attributes:
        history: the images of each visitor.
        identities: those of the last reference images, see `inputs.open_request`.
    """

    def __init__(
        self,
        directory: Path,
        device: str | None = None,
        models: ModelSelection | None = None,
        has_history: bool = False,
        allow_paths: bool = False,
        signer: ContentSigner | None = None,
    ) -> None:
        self.directory = directory
        self.allow_paths = allow_paths
        self.signer = signer
        self.history = History(has_history, directory / UPLOADS)
        self.device = device
        self.models = models or ModelSelection()
        self._studio: Studio | None = None
        self._extractor: tuple[ModelSelection, IdentityExtractor] | None = None
        self.identities: OrderedDict[object, Identity] = OrderedDict()
        self._presets: dict[ModelSelection, Preset] = {}
        self._begun: deque[str] = deque(maxlen=MAX_JOBS)
        self._stopped: deque[str] = deque(maxlen=MAX_JOBS)

    def make_folder(self) -> Path:
        """Create a folder for the files of a run.

        Without a history, older ones are removed like uploads, so that the disk does not fill up.
        """
        if not self.history.is_on:
            for folder in self.directory.glob(f"{RUN_PREFIX}*"):
                with suppress(OSError):  # another visitor's run may remove it too
                    if time.time() - folder.stat().st_mtime > KEPT_SECONDS:
                        shutil.rmtree(folder)
        return Path(mkdtemp(prefix=RUN_PREFIX, dir=self.directory))

    def select_models(self, preset: str, method: str = "pulid") -> ModelSelection:
        """Return the models of a preset and a method.

        The changes of the first preset apply to that preset alone, and its adapter to PuLID alone.
        """
        models = self.models if preset == self.models.preset else ModelSelection(preset=preset)
        if method == "pulid":
            return models
        return models.model_copy(update={"method": method, "adapter": None})

    def preset_names(self) -> list[str]:
        """Return the names of the presets that can be used, the first one first."""
        return list(dict.fromkeys([self.models.preset, *find_installed_presets()]))

    def method_names(self, preset: Preset) -> list[str]:
        """Return the names of the methods that can be used on a preset, PuLID first."""
        return find_installed_methods(preset)

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
        from openpulid.pipelines.loading import load

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

    def begin(self, job: str) -> None:
        """Note that a call of `generate` is not in the queue any more."""
        self._begun.append(job)

    def has_begun(self, job: str) -> bool:
        """Whether a call of `generate` has left the queue."""
        return job in self._begun

    def stop(self, job: str) -> None:
        """End a call of `generate` after its present step, also one that has not begun."""
        if job:
            self._stopped.append(job)

    def is_stopped(self, job: str) -> bool:
        """Whether a call of `generate` is to end."""
        return job in self._stopped
