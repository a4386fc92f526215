"""Prompt and identity to images.

studio = load("mini")
anna = studio.identify("anna.png")
studio.generate("portrait, film noir", identity=anna, seed=7, num_images=4).images
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from PIL import Image

from openpulid.device import best_device
from openpulid.errors import OptionError
from openpulid.identity.extractor import IdentityExtractor
from openpulid.identity.identity import Identity
from openpulid.identity.reference import ImageSource, ReferenceFaces
from openpulid.methods.adapter import Adapter
from openpulid.methods.pulid import People, delay_guidance, normalize_people
from openpulid.pipelines.factory import load_adapter, load_extractor, load_pipeline
from openpulid.pipelines.finite import run_pipeline
from openpulid.pipelines.inputs import RequestInputs, open_inputs
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.prompts import prepare_prompts
from openpulid.pipelines.request import IDENTITY_NAMES, GenerationRequest
from openpulid.pipelines.selection import PresetSource, resolve_preset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GenerationResult:
    """The images of a generation.

    Attributes:
        images: the images.
        requests: for each image the resolved request that regenerates it alone.
    """

    images: list[Image.Image]
    requests: list[GenerationRequest]

    @property
    def seeds(self) -> list[int]:
        """The seed of each image."""
        return [request.seed for request in self.requests]

    def __repr__(self) -> str:
        count = len(self.images)
        size = "x".join(map(str, self.images[0].size)) if self.images else "none"
        seeds = ", ".join(map(str, self.seeds[:4])) + (", ..." if count > 4 else "")
        return f"GenerationResult({count} images, size: {size}, seeds: {seeds})"


class Studio:
    """A base model, a method, and an identity extractor, ready to use.

    Threads can share a studio; their images are generated one after the other.

    Args:
        pipe: a StableDiffusionXLPipeline or FluxPipeline.
        adapter: the method; it is attached to the pipeline.
        extractor: extracts identities for the method.
        preset: defaults of a generation.
    """

    def __init__(
        self, pipe: Any, adapter: Adapter, extractor: IdentityExtractor, preset: Preset
    ) -> None:
        self.pipe = pipe
        self.adapter = adapter
        self.extractor = extractor
        self.preset = preset
        # an open adapter, and the pipeline's guidance, are state of the network
        self._lock = threading.Lock()
        adapter.attach(pipe)

    def detect(self, images: ImageSource | Sequence[ImageSource]) -> ReferenceFaces:
        """Detect the faces in reference images of one person.

        Args:
            images: one or several paths or PIL images.

        Raises:
            ImageError: a file is not an image.
            FaceError: an image has no face that this preset knows.
        """
        return ReferenceFaces.detect(self.extractor, images)

    def identify(
        self,
        images: ImageSource | Sequence[ImageSource],
        face_index: int | None = None,
        face_order: str = "large-small",
        fusion: str = "concat",
        weights: Sequence[float] | None = None,
    ) -> Identity:
        """Extract the identity of one person from one or several reference images.

        Args:
            images: paths or PIL images.
            face_index: which face of an image with several, counted from 0 in `face_order`; the
                first by default.
            face_order: one of `faces.select.ORDERS`.
            fusion: how several images are combined, see `identity.fuse_identities`.
            weights: weights of the images in the fusion.

        Raises:
            ImageError: a file is not an image.
            FaceError: an image has no face that this preset knows, or fewer faces.
        """
        return self.detect(images).identity(face_index, face_order, fusion, weights)

    def generate(
        self,
        request: GenerationRequest | str,
        identity: People | None = None,
        *,
        inputs: RequestInputs | None = None,
        batch_size: int = 1,
        **options: Any,
    ) -> GenerationResult:
        """Generate the images of a request, or of a prompt with options.

        Args:
            request: a request, or a prompt.
            identity: with a prompt: an identity, or several people with masks, as `PuLID.use`
                accepts them. A request names its people itself.
            inputs: the input files of the request, if they are open already.
            batch_size: images computed at once. With 1, image k is bit for bit what `seed + k`
                gives alone. More may be faster, and equal up to rounding.
            options: with a prompt: fields of `GenerationRequest` and of `IdentityOptions`, such as
                `seed=7`, `num_inference_steps=25`, `scale=0.8`.

        Raises:
            PromptError: the model does not know a word of a prompt.
            IdentityError: other models produced the identity.
            OptionError: an option is out of range, or not supported by the preset.
            NonFiniteError: the models gave NaN or infinity.
        """
        if isinstance(request, str):
            request = GenerationRequest.from_options(prompt=request, **options)
        elif options or identity is not None:
            raise OptionError("set options and people in the request, not in addition to it.")
        if identity is not None and request.people:
            raise OptionError("pass an identity or people, not both.")
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1, got {batch_size}.")
        is_person_shown = identity is not None or bool(request.people)
        for note in self.preset.describe_ineffective(request, is_person_shown):
            logger.warning("%s", note)
        request = self.preset.resolve(request, is_person_shown)
        inputs = open_inputs(request) if inputs is None else inputs
        people = self._people(request, inputs) if identity is None else identity
        images: list[Image.Image] = []
        with self._lock:
            readable = prepare_prompts(self.pipe, request, self.preset)
            with inputs.use_controls(self.pipe), self._use_identity(people, request):
                for seeds in _batches(request, batch_size):
                    images += self._run(readable, seeds)
        requests = [
            request.for_image(request.seed + k, *image.size) for k, image in enumerate(images)
        ]
        return GenerationResult(images, requests)

    def _people(self, request: GenerationRequest, inputs: RequestInputs) -> People | None:
        """Return the people of a request as the adapter accepts them."""
        if not request.people:
            return None
        person = request.people[0]
        files = inputs.people[0]
        identity = files.identity
        if not isinstance(identity, Identity):
            identity = self.identify(identity, person.face_index, person.face_order)
        return identity if files.mask is None else [(identity, files.mask)]

    def _use_identity(
        self, people: People | None, request: GenerationRequest
    ) -> AbstractContextManager[Any]:
        is_flux = "true_cfg_scale" in self.preset.options
        # without guidance by a negative prompt there is no step to wait for
        is_guided = is_flux and (request.true_cfg_scale or 1) > 1
        first_guided_step = (request.timestep_to_start_cfg or 0) if is_guided else 0
        if people is None:
            return delay_guidance(self.pipe, first_guided_step) if is_flux else nullcontext()
        if not isinstance(people, Identity) and self.preset.models.method != "pulid":
            raise OptionError(
                "masks and several people in one image are only supported by PuLID, "
                f"not by {self.preset.models.method}."
            )
        for identity, _ in chain(*normalize_people(people)):
            identity.require(self.extractor.models)
        supported = [name for name in IDENTITY_NAMES if name in self.preset.options]
        options: dict[str, Any] = {name: getattr(request.identity, name) for name in supported}
        if request.people and request.people[0].scale is not None:
            options["scale"] = request.people[0].scale
        if is_flux:
            options["timestep_to_start_cfg"] = first_guided_step
        return self.adapter.use(people, **options, pipe=self.pipe)

    def _run(self, request: GenerationRequest, seeds: Sequence[int]) -> list[Image.Image]:
        count = len(seeds)
        negative_prompt = request.negative_prompt
        options: dict[str, Any] = {
            name: getattr(request, name)
            for name in ("true_cfg_scale", "max_sequence_length")
            if name in self.preset.options
        }
        return run_pipeline(
            self.pipe,
            prompt=[request.prompt] * count,
            # "" is encoded; None is what the pipeline uses without a negative prompt
            negative_prompt=None if negative_prompt is None else [negative_prompt] * count,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale or 0.0,  # FLUX.1-schnell has none
            width=request.width,
            height=request.height,
            **options,
        )


def _batches(request: GenerationRequest, size: int) -> Iterator[list[int]]:
    """Yield the seeds of a request, `size` at a time."""
    seeds = [request.seed + k for k in range(request.num_images)]
    for first in range(0, len(seeds), size):
        yield seeds[first : first + size]


def load(
    preset: PresetSource = "mini",
    device: str | torch.device | None = None,
    base: str | os.PathLike[str] | None = None,
    memory: str | None = None,
    method: str | None = None,
    face_pack: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Studio:
    """Load a studio from local files.

    Args:
        preset: a preset, its name, a directory of weights, or the models of a request.
        device: where to compute; the accelerator if there is one, else the CPU.
        base: another base model, see `selection.resolve_preset`.
        memory: memory level of FLUX.
        method: another method.
        face_pack: directory of another insightface pack.
        adapter: another adapter file of the method.

    Raises:
        OptionError: there is no such preset, or a change does not apply to it.
        WeightsError: weights are missing or damaged.
    """
    resolved = resolve_preset(preset, base, method, adapter, face_pack, memory)
    target = torch.device(device) if device is not None else best_device()
    loaded_adapter = load_adapter(resolved, target)
    pipe = load_pipeline(resolved, target)
    return Studio(pipe, loaded_adapter, load_extractor(resolved, target, loaded_adapter), resolved)
