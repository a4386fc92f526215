"""The input files of a request, opened once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from openpulid.identity.extractor import IdentityExtractor
from openpulid.identity.identity import Identity
from openpulid.identity.reference import ReferenceFaces, ReferenceImage, open_references
from openpulid.io.images import is_image_source, open_image, open_mask
from openpulid.methods.pulid import People
from openpulid.pipelines.add_ons import AddOns, open_add_ons
from openpulid.pipelines.controls import ControlInput, open_controls, use_controls
from openpulid.pipelines.init_image import Edit, InitImageInput, fit_inpaint_mask
from openpulid.pipelines.memory_levels import find_level
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.provenance import fingerprint_inputs
from openpulid.pipelines.regions import build_masks
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import InitImage, Person

IDENTITY_SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class PersonInput:
    """The files of a `Person`: an identity, or images to extract it from, and a mask."""

    identity: Identity | Sequence[ReferenceImage]
    mask: Image.Image | None


@dataclass(frozen=True, eq=False)
class RequestInputs:
    """All input files of a request, decoded.

    Attributes:
        people: the files of each person.
        init_image: the image to start from.
        controls: the files of each ControlNet.
        add_ons: LoRAs, and what else is added to the base model.
        fingerprints: path of a field in the request -> hash of the file that it names.
    """

    people: tuple[PersonInput, ...] = ()
    init_image: InitImageInput | None = None
    controls: tuple[ControlInput, ...] = ()
    add_ons: AddOns = field(default_factory=AddOns)
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def check(self, models: ModelSet) -> None:
        """Check what the header of a file tells, before the base model is loaded.

        Args:
            models: the models that run the request.

        Raises:
            WeightsError: a file is for another base model.
        """
        self.add_ons.check(models)
        for control in self.controls:
            control.check(models.base_name)

    def without_people(self) -> RequestInputs:
        """Return the inputs of the same request without its people."""
        fingerprints = {
            name: value
            for name, value in self.fingerprints.items()
            if not name.startswith("people.")
        }
        return replace(self, people=(), fingerprints=fingerprints)

    @property
    def has_reference_images(self) -> bool:
        """Whether the identity of a person has yet to be extracted."""
        return any(not isinstance(person.identity, Identity) for person in self.people)

    @property
    def identities(self) -> list[Identity]:
        """The identities that are extracted already."""
        found = [person.identity for person in self.people]
        return [identity for identity in found if isinstance(identity, Identity)]

    def with_identities(
        self, request: GenerationRequest, extractor: IdentityExtractor
    ) -> RequestInputs:
        """Replace the reference images of each person by the identity that they give.

        Args:
            request: the request that names these files.
            extractor: the identity extractor of its preset.

        Raises:
            FaceError: an image has no face that the extractor knows, or fewer faces.
        """
        people = []
        for person, files in zip(request.people, self.people, strict=True):
            identity = files.identity
            if not isinstance(identity, Identity):
                faces = ReferenceFaces.detect(extractor, identity)
                identity = faces.identity(person.face_index, person.face_order)
            people.append(replace(files, identity=identity))
        return replace(self, people=tuple(people))

    def with_control_maps(self) -> RequestInputs:
        """Detect the control images of ControlNets with plain images.

        Raises:
            OptionError: an image shows no person for a pose.
            WeightsError: what detects the control image is damaged.
        """
        return replace(self, controls=tuple(control.with_map() for control in self.controls))

    def fit(self, request: GenerationRequest, models: ModelSet) -> GenerationRequest:
        """Return a request with the ratio of its initial image, unless it has a size.

        Args:
            request: the request that names these files, before defaults are filled in.
            models: the models that run it.

        Raises:
            WeightsError: a file is for another base model.
        """
        self.check(models)
        if self.init_image is None:
            return request
        width, height = self.init_image.choose_size(models)
        size = {"width": request.width or width, "height": request.height or height}
        return request.model_copy(update=size)

    def describe_fit(self, request: GenerationRequest) -> list[str]:
        """Return a note if `init_image.resize` is set but the image keeps its ratio in `fit`.

        Args:
            request: the request before `fit`.
        """
        has_size = request.width is not None or request.height is not None
        if request.init_image is None or request.init_image.resize == "crop" or has_size:
            return []
        mode = request.init_image.resize
        return [f"resize {mode} has little effect without a size: the image keeps its ratio"]

    def prepare_edit(
        self, request: GenerationRequest, pipe: Any, seeds: Sequence[int]
    ) -> Edit | None:
        """Prepare one call of a pipeline that starts from the initial image; None without one.

        Args:
            request: the request of these files, of which `fit` has set the size.
            pipe: the pipeline that runs.
            seeds: of the images of the call.
        """
        if self.init_image is None or request.init_image is None:
            return None
        assert request.width is not None and request.height is not None
        resized = self.init_image.resize(request.width, request.height, request.init_image.resize)
        return resized.prepare(pipe, request.init_image.strength, seeds)

    def place_people(self, request: GenerationRequest, width: int, height: int) -> People:
        """Return the people as the adapter accepts them, each with the mask of its region, if any.

        Args:
            request: the resolved request, which has people with identities.
            width: of the generated image in pixels.
            height: of the generated image in pixels.
        """
        identities = [files.identity for files in self.people]
        assert all(isinstance(identity, Identity) for identity in identities)
        if not any(person.has_region for person in request.people):
            # several without regions have one scale, which is the adapter's
            several = [(identity, None) for identity in identities]
            return several if len(several) > 1 else identities[0]
        masks = build_masks(request, [files.mask for files in self.people], (width, height))
        people = zip(identities, masks, request.identity_scales, strict=True)
        shown = [(identity, mask) for identity, mask, scale in people if scale > 0]
        return shown or identities[0]

    @contextmanager
    def use(self, pipe: Any, models: ModelSet) -> Iterator[dict[str, Tensor]]:
        """Let a pipeline follow the ControlNets, with the add-ons, while this is open.

        Args:
            pipe: the pipeline.
            models: the models of the pipeline, for their memory level.

        Yields:
            Further arguments of the pipeline, each (1, ...) for one image.
        """
        level = find_level(models.family, models.memory)
        with self.add_ons.use(pipe) as options, use_controls(self.controls, pipe, level):
            yield options


def open_inputs(
    request: GenerationRequest,
    models: ModelSet,
    identity: Identity | None = None,
    time_limit: float | None = None,
) -> RequestInputs:
    """Open the input files of a request; no network is loaded.

    Args:
        request: the request.
        models: the models that run the request; they decide which IP-Adapter a style image has if
            the request names none.
        identity: the identity of its person, if it is extracted already; the reference images are
            not opened then.
        time_limit: seconds for each image, as for `open_image`.

    Raises:
        ImageError: a file is not an image.
        RequestError: the inpaint mask is black.
        IdentityError: a file is not an identity.
        WeightsError: a ControlNet or an add-on is missing, damaged, or of another kind.
    """
    people = tuple(_open_person(person, identity, time_limit) for person in request.people)
    init_image = None if request.init_image is None else _open_init(request.init_image, time_limit)
    controls = open_controls(request.controls, time_limit)
    add_ons = open_add_ons(request, models, time_limit)
    return RequestInputs(people, init_image, controls, add_ons, fingerprint_inputs(request))


def describe_person(path: str | os.PathLike[str]) -> Person:
    """Return the person of a request whose identity file or reference image has a path."""
    name = os.fspath(path)
    if Path(name).suffix == IDENTITY_SUFFIX:
        return Person(identity=name)
    return Person(images=(name,))


def open_person(person: Any) -> Any:
    """Open the identity file or the image of one person; return anything else as it is.

    Returns:
        An identity, a `ReferenceImage`, or the argument.

    Raises:
        ImageError: the file is not an image.
        IdentityError: the file is not an identity.
    """
    if isinstance(person, (str, os.PathLike)) and Path(person).suffix == IDENTITY_SUFFIX:
        return Identity.load(person)
    if is_image_source(person):
        return open_references(person)[0]
    return person


def _open_person(
    person: Person, identity: Identity | None, time_limit: float | None
) -> PersonInput:
    files: Identity | list[ReferenceImage]
    if identity is not None:
        files = identity
    elif person.identity is not None:
        files = Identity.load(person.identity)
    else:
        files = open_references(person.images, time_limit)
    mask = None if person.mask is None else open_mask(person.mask, time_limit=time_limit)
    return PersonInput(files, mask)


def _open_init(init_image: InitImage, time_limit: float | None) -> InitImageInput:
    image = open_image(init_image.image, min_side=1, time_limit=time_limit)
    mask = None
    if init_image.mask is not None:
        mask = fit_inpaint_mask(open_mask(init_image.mask, time_limit=time_limit), image)
    return InitImageInput(image, mask)
