"""What is added to the base model next to the identity: LoRAs, words, a style image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from openpulid.pipelines.embeddings import EmbeddingInput, open_embedding, use_embeddings
from openpulid.pipelines.loras import LoraInput, open_lora, use_loras
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.style_flux import FluxStyleInput
from openpulid.pipelines.style_image import StyleAdapterFile, StyleInput, open_style


@dataclass(frozen=True, eq=False)
class AddOns:
    """The add-ons of a request, found and checked.

    Attributes:
        loras: the file of each LoRA.
        embeddings: the file of each word of textual inversion.
        style: the files of the style image.
    """

    loras: tuple[LoraInput, ...] = ()
    embeddings: tuple[EmbeddingInput, ...] = ()
    style: StyleInput | FluxStyleInput | None = None

    def check(self, models: ModelSet) -> None:
        """Check that they are for the base model, before it is loaded.

        Raises:
            WeightsError: one is for another base model.
        """
        for lora in self.loras:
            lora.check(models)
        for embedding in self.embeddings:
            embedding.check(models)

    def share_style(self, files: dict[Path, StyleAdapterFile]) -> AddOns:
        """Return the same add-ons with the IP-Adapter that another style image has loaded.

        Args:
            files: of other requests, by path; the file of this one is added. On FLUX the pipeline
                loads it.
        """
        if not isinstance(self.style, StyleInput):
            return self
        file = files.setdefault(self.style.file.path, self.style.file)
        return replace(self, style=replace(self.style, file=file))

    @contextmanager
    def use(self, pipe: Any) -> Iterator[dict[str, Tensor]]:
        """Apply them to a pipeline while this is open; afterwards it is as it was.

        Args:
            pipe: a pipeline of SDXL or FLUX.

        Yields:
            Arguments of the pipeline, each (1, ...) for one image.

        Raises:
            WeightsError: one does not fit the base model.
        """
        with ExitStack() as stack:
            stack.enter_context(use_loras(pipe, self.loras))
            stack.enter_context(use_embeddings(pipe, self.embeddings))
            options = {} if self.style is None else stack.enter_context(self.style.use(pipe))
            yield options


def open_add_ons(
    request: GenerationRequest, models: ModelSet, time_limit: float | None = None
) -> AddOns:
    """Open the add-ons of a request.

    Args:
        request: the request.
        models: the models that run the request.
        time_limit: seconds for an image, as for `open_image`.

    Raises:
        ImageError: the style image is not an image.
        WeightsError: a file is missing, damaged, or of another kind.
    """
    return AddOns(
        tuple(map(open_lora, request.loras)),
        tuple(map(open_embedding, request.embeddings)),
        None
        if request.style_image is None
        else open_style(request.style_image, models, time_limit),
    )
