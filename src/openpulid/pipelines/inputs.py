"""The input files of a request, opened once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from openpulid.identity.identity import Identity
from openpulid.identity.reference import ReferenceImage, open_references
from openpulid.io.images import open_image
from openpulid.methods.controlnet import ControlNet, canny_edges
from openpulid.pipelines.request import Control, GenerationRequest, Person
from openpulid.pipelines.weights import resolve_path

EDGES = "control-edges"
"""The published ControlNet whose control image is made of the edges of any image."""


@dataclass(frozen=True, eq=False)
class PersonInput:
    """The files of a `Person`: an identity, or images to extract it from, and a mask."""

    identity: Identity | Sequence[ReferenceImage]
    mask: Image.Image | None


@dataclass(frozen=True, eq=False)
class ControlInput:
    """The files of a `Control`."""

    net: ControlNet
    image: Image.Image
    scale: float


@dataclass(frozen=True, eq=False)
class RequestInputs:
    """All input files of a request, decoded."""

    people: tuple[PersonInput, ...] = ()
    controls: tuple[ControlInput, ...] = ()

    @contextmanager
    def use_controls(self, pipe: Any) -> Iterator[None]:
        """Let a pipeline follow the ControlNets while this is open."""
        with ExitStack() as stack:
            for control in self.controls:
                control.net.attach(pipe)
                stack.callback(control.net.detach, pipe)
                stack.enter_context(control.net.use(control.image, scale=control.scale))
            yield


def open_inputs(request: GenerationRequest) -> RequestInputs:
    """Open the input files of a request.

    Raises:
        ImageError: a file is not an image.
        IdentityError: a file is not an identity.
        WeightsError: a ControlNet is missing or damaged.
    """
    people = tuple(_open_person(person) for person in request.people)
    return RequestInputs(people, tuple(_open_control(control) for control in request.controls))


def _open_person(person: Person) -> PersonInput:
    identity: Identity | list[ReferenceImage]
    if person.identity is not None:
        identity = Identity.load(person.identity)
    else:
        identity = open_references(person.images)
    return PersonInput(identity, None if person.mask is None else open_image(person.mask))


def _open_control(control: Control) -> ControlInput:
    image = open_image(control.image)
    net = ControlNet.load(resolve_path(control.model))
    if control.model == EDGES:
        image = canny_edges(image)
    return ControlInput(net, image, control.scale)
