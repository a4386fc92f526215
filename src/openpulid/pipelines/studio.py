"""Prompt and identity to images.

studio = load("mini")
anna = studio.identify("anna.png")
studio.generate("portrait, film noir", identity=anna, seed=7, num_images=4).images
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain
from typing import Any

from openpulid.errors import OptionError, Stopped
from openpulid.identity.extractor import DeferredExtractor, IdentityExtractor
from openpulid.identity.identity import Identity
from openpulid.identity.reference import ImageSource, ReferenceFaces, ReferenceImage
from openpulid.methods.adapter import Adapter
from openpulid.methods.pulid import People, compiling_pays, normalize_people
from openpulid.pipelines.batching import check_batch
from openpulid.pipelines.inputs import (
    RequestInputs,
    describe_person,
    open_inputs,
    open_person,
)
from openpulid.pipelines.presets import Preset
from openpulid.pipelines.progress import Callback, Progress
from openpulid.pipelines.regions import crop_masks
from openpulid.pipelines.request import GenerationRequest, parse_size
from openpulid.pipelines.result import GenerationResult, OnImage
from openpulid.pipelines.runner import PipelineRunner

logger = logging.getLogger(__name__)


class Studio:
    """A base model, a method, and an identity extractor, ready to use.

    Threads can share a studio; their images are generated one after the other.

    Args:
        pipe: a StableDiffusionXLPipeline, FluxPipeline or ChromaPipeline.
        adapter: the method; it is attached to the pipeline.
        extractor: extracts identities for the method; a deferred one is loaded for the first image.
        preset: defaults of a generation.
    """

    def __init__(
        self,
        pipe: Any,
        adapter: Adapter,
        extractor: IdentityExtractor | DeferredExtractor,
        preset: Preset,
    ) -> None:
        self.pipe = pipe
        self.adapter = adapter
        self.preset = preset
        self._runner = PipelineRunner(pipe, adapter, preset)
        self._extractor = extractor
        self._extractor_lock = threading.Lock()
        # an open adapter, and the pipeline's guidance, are state of the network
        self._lock = threading.Lock()

    @property
    def extractor(self) -> IdentityExtractor:
        """The identity extractor; it is loaded now if it has not been needed yet."""
        with self._extractor_lock:
            if isinstance(self._extractor, DeferredExtractor):
                self._extractor = self._extractor.load()
            return self._extractor

    def detect(self, images: ImageSource | Sequence[ImageSource]) -> ReferenceFaces:
        """Detect the faces in reference images of one person.

        Args:
            images: one or several images, as `io.images.open_image` accepts them: paths, PIL
                images, arrays (H, W, 3), tensors (3, H, W), bytes or open files.

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
            images: one or several images, see `detect`.
            face_index: which face of an image with several, counted from 0 in `face_order`; the
                first by default.
            face_order: one of `faces.face.ORDERS`.
            fusion: how several images are combined, see `identity.fuse_identities`.
            weights: weights of the images in the fusion.

        Raises:
            ImageError: a file is not an image.
            FaceError: an image has no face that this preset knows, or fewer faces.
        """
        return self.detect(images).identity(face_index, face_order, fusion, weights)

    def similarity(
        self, image: ImageSource, identity: Identity | ImageSource, face_index: int | None = None
    ) -> float:
        """Compare the face in an image with a person, with the face recognition of this preset.

        The method has seen the same model's features, so it is no independent judge: `pulid bench`
        uses another model.

        Args:
            image: such as a generated one, see `detect`.
            identity: an identity, its file, or an image of the person.
            face_index: which face of an image with several; the largest by default.

        Returns:
            The cosine similarity, -1 to 1.

        Raises:
            ImageError: an image cannot be used.
            FaceError: an image has no face that this preset knows, or fewer faces.
            IdentityError: other models produced the identity.
            OptionError: the method has no face recognition model.
        """
        person = open_person(identity)
        if not isinstance(person, Identity):
            person = self.identify(person)
        return self.detect(image).similarity(person, face_index or 0)

    def generate(
        self,
        request: GenerationRequest | str,
        identity: People | ImageSource | None = None,
        *,
        inputs: RequestInputs | None = None,
        batch_size: int = 1,
        on_image: OnImage | None = None,
        callback: Callback | None = None,
        **options: Any,
    ) -> GenerationResult:
        """Generate the images of a request, or of a prompt with options.

        Args:
            request: a request, or a prompt.
            identity: with a prompt: an identity, its file, an image of the person, or several
                people with masks, as `PuLID.use` accepts them; with FastComposer the masks are
                None. A request names its people itself.
                A mask of another ratio than the images is cropped evenly, with a note.
            inputs: the input files of the request, if they are open already.
            batch_size: images computed at once. With 1, image k is bit for bit what `seed + k`
                gives alone. More may be faster, and equal up to rounding.
            on_image: receives each image as soon as it is generated, for example to save it.
            callback: called after every step as `callback(step, total, preview)`: the number of
                steps that are done, that of all images, and a function that decodes a small image.
                It can raise `Stopped` to end the generation; the finished images are returned.
            options: with a prompt: fields of `GenerationRequest` and of `IdentityOptions`, such as
                `seed=7`, `num_inference_steps=25`, `scale=0.8`.

        Raises:
            PromptError: the model does not know a word of a prompt.
            IdentityError: other models produced the identity.
            OptionError: an option is out of range, or not supported by the preset.
            NonFiniteError: the models gave NaN or infinity.
            ImageError: the image of the person cannot be used.
            FaceError: it has no face that this preset knows.
        """
        if isinstance(request, str):
            request = GenerationRequest.from_options(prompt=request, **_parse_size(options))
        elif not isinstance(request, GenerationRequest):
            raise OptionError(
                "expected one prompt or a GenerationRequest, got "
                f"{type(request).__name__}; for several prompts, call generate for each."
            )
        elif options or identity is not None:
            raise OptionError("set options and people in the request, not in addition to it.")
        if identity is not None and request.people:
            raise OptionError("pass an identity or people, not both.")
        if inputs is None and isinstance(identity, (str, os.PathLike)):
            # a file, which the stored request can name
            request = request.model_copy(update={"people": (describe_person(identity),)})
            identity = None
        if not hasattr(batch_size, "__index__") or batch_size < 1:
            raise OptionError(
                f"batch_size must be a whole number of 1 or more, got {batch_size!r}."
            )
        request, inputs = self._prepare(request, inputs, has_identity=identity is not None)
        if identity is None:
            people = self._people(request, inputs)
        else:
            people = open_person(identity)
            if isinstance(people, ReferenceImage):
                people = self.identify(people)
            self._check_people(request, people)
            _check_batches(request, people, batch_size)
            size = request.image_size(self.preset.models.native_side)
            people = crop_masks(people, size)
        result = GenerationResult([], [], dict(inputs.fingerprints))
        if identity is not None:
            request = result.describe_people(request, people)
        progress = Progress(callback, self.preset.models, request)
        with self._lock, suppress(Stopped):
            for seed, image in self._runner.run(request, people, inputs, progress, batch_size):
                result.images.append(image)
                result.requests.append(request.for_image(seed, *image.size))
                if on_image is not None:
                    on_image(image, result.requests[-1])
        return result

    def generate_batch(
        self,
        requests: Sequence[GenerationRequest],
        identity: Identity | None = None,
        *,
        inputs: Sequence[RequestInputs] | None = None,
        callback: Callback | None = None,
    ) -> list[GenerationResult]:
        """Generate one image of each of several requests, all at once.

        Every image equals that of `generate` up to rounding. Prompts, seeds and people can differ;
        everything else is the same, see `batching.batch_key`.

        Args:
            requests: requests of one image each.
            identity: shown in every image, if the requests name no people.
            inputs: the input files of each request, if they are open already.
            callback: see `generate`; if it raises `Stopped`, there are no images.

        Returns:
            The result of each request.

        Raises:
            OptionError: the requests cannot share a batch; otherwise as `generate`.
        """
        if inputs is None:
            inputs = [open_inputs(request, self.preset.models) for request in requests]
        has_identity = identity is not None
        if has_identity and any(request.people for request in requests):
            raise OptionError("pass an identity or people, not both.")
        prepared = [
            self._prepare(request, files, has_identity)
            for request, files in zip(requests, inputs, strict=True)
        ]
        check_batch(prepared)
        results = [GenerationResult([], [], dict(files.fingerprints)) for _, files in prepared]
        rows = [request for request, _ in prepared]
        people: list[People | None]
        if identity is None:
            people = [self._people(request, files) for request, files in prepared]
        else:
            self._check_people(rows[0], identity)
            people = [identity] * len(rows)
            rows = [
                result.describe_people(row, identity)
                for result, row in zip(results, rows, strict=True)
            ]
        progress = Progress(callback, self.preset.models, *rows)
        with self._lock, suppress(Stopped):
            images = self._runner.run_together(rows, people, progress)
            for result, request, image in zip(results, rows, images, strict=True):
                result.images.append(image)
                result.requests.append(request.for_image(request.seed, *image.size))
        return results

    def _prepare(
        self, request: GenerationRequest, inputs: RequestInputs | None, has_identity: bool = False
    ) -> tuple[GenerationRequest, RequestInputs]:
        """Resolve a request and open its files.

        Args:
            request: the request.
            inputs: its files, if they are open already.
            has_identity: whether a person is shown whom the request does not name.
        """
        is_person_shown = has_identity or bool(request.people)
        resolved = self.preset.resolve(request, is_person_shown)
        if inputs is None:
            inputs = open_inputs(resolved, self.preset.models)
        notes = inputs.describe_fit(request)
        request = inputs.fit(request, self.preset.models)
        for note in [*notes, *self.preset.describe_ineffective(request, is_person_shown)]:
            logger.warning("%s", note)
        resolved = self.preset.resolve(request, is_person_shown)
        is_undecided = "compiled" in self.preset.options and resolved.identity.compiled is None
        if is_person_shown and is_undecided:
            device = self.pipe._execution_device
            if compiling_pays(device, resolved.num_images):
                # stored with each image, which is then regenerated alone as it was
                resolved = resolved.with_compiled(True)
        return resolved, inputs.with_control_maps()

    def _people(self, request: GenerationRequest, inputs: RequestInputs) -> People | None:
        """Return the people of a request as the adapter accepts them."""
        if not request.people:
            return None
        if inputs.has_reference_images:
            inputs = inputs.with_identities(request, self.extractor)
        size = request.image_size(self.preset.models.native_side)
        people = inputs.place_people(request, *size)
        self._check_people(request, people)
        return people

    def _check_people(self, request: GenerationRequest, people: People) -> None:
        """Check that the method can show these people."""
        models = self.preset.models
        if not isinstance(people, Identity):
            if not models.supports_masks and not models.shows_people_by_words:
                raise OptionError(
                    "several people in one image are only supported by PuLID, InfiniteYou and "
                    "FastComposer, and masks only by PuLID and InfiniteYou, not by "
                    f"{models.method}."
                )
            has_several = any(len(prompt) > 1 for prompt in normalize_people(people))
            if has_several and models.shows_people_by_words and request.refine_faces is not None:
                raise OptionError(
                    f"refine_faces needs a region for each person, and {models.method} has no "
                    "regions; leave it out."
                )
        if request.refine_faces is not None and len(normalize_people(people)) > 1:
            raise OptionError("refine_faces needs people with masks, not one for each image.")
        for identity, _ in chain(*normalize_people(people)):
            identity.require(self._extractor.models)


def _check_batches(request: GenerationRequest, people: People, batch_size: int) -> None:
    """Check that identities for one image each can be divided among the images of each batch.

    Raises:
        OptionError: they cannot.
    """
    count = len(normalize_people(people))
    whole, rest = divmod(request.num_images, batch_size)
    sizes = [batch_size] * bool(whole) + [rest] * bool(rest)
    for size in sizes:
        if size % count:
            raise OptionError(
                f"a list of {count} identities has one for each image, and a batch has {size}; for "
                "several people in one image pass [(identity, mask), ...], and for one person per "
                "image call generate for each."
            )


def _parse_size(options: dict[str, Any]) -> dict[str, Any]:
    """Replace a size, such as "832x1216" or (832, 1216), by width and height.

    Raises:
        OptionError: it is no size, or width or height are set as well.
    """
    if "size" not in options:
        return options
    size = options["size"]
    if isinstance(size, Sequence) and not isinstance(size, str) and len(size) == 2:
        width, height = size
    else:
        width, height = parse_size(str(size))
    if "width" in options or "height" in options:
        raise OptionError("set either size, or width and height.")
    rest = {name: value for name, value in options.items() if name != "size"}
    return {**rest, "width": width, "height": height}
