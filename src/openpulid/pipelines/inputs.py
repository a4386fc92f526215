"""The inputs of a request: its files, opened once, and the check of its prompts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from openpulid.errors import PromptError
from openpulid.identity.extractor import IdentityExtractor
from openpulid.identity.identity import Identity
from openpulid.identity.reference import ReferenceFaces, ReferenceImage, open_references
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

    @property
    def has_reference_images(self) -> bool:
        """Whether the identity of a person has yet to be extracted."""
        return any(not isinstance(person.identity, Identity) for person in self.people)

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

    @contextmanager
    def use_controls(self, pipe: Any) -> Iterator[None]:
        """Let a pipeline follow the ControlNets while this is open."""
        with ExitStack() as stack:
            for control in self.controls:
                control.net.attach(pipe)
                stack.callback(control.net.detach, pipe)
                stack.enter_context(control.net.use(control.image, scale=control.scale))
            yield


def open_inputs(request: GenerationRequest, identity: Identity | None = None) -> RequestInputs:
    """Open the input files of a request.

    Args:
        request: the request.
        identity: the identity of its person, if it is extracted already; the reference images are
            not opened then.

    Raises:
        ImageError: a file is not an image.
        IdentityError: a file is not an identity.
        WeightsError: a ControlNet is missing or damaged.
    """
    people = tuple(_open_person(person, identity) for person in request.people)
    return RequestInputs(people, tuple(_open_control(control) for control in request.controls))


def _open_person(person: Person, identity: Identity | None) -> PersonInput:
    files: Identity | list[ReferenceImage]
    if identity is not None:
        files = identity
    elif person.identity is not None:
        files = Identity.load(person.identity)
    else:
        files = open_references(person.images)
    return PersonInput(files, None if person.mask is None else open_image(person.mask))


def _open_control(control: Control) -> ControlInput:
    image = open_image(control.image)
    net = ControlNet.load(resolve_path(control.model))
    if control.model == EDGES:
        image = canny_edges(image)
    return ControlInput(net, image, control.scale)


def check_prompts(pipe: Any, request: GenerationRequest, negative_prompt: str | None) -> None:
    """Refuse what the text encoders would silently drop.

    Args:
        pipe: a StableDiffusionXLPipeline or FluxPipeline.
        request: a resolved request.
        negative_prompt: the user's negative prompt. A preset's own is not checked: it may be
            longer than what the model reads, and is cut.

    Raises:
        PromptError: the model does not know a word, or the prompt is too long.
    """
    if request.max_sequence_length is not None:  # FLUX: T5 reads the longer prompt
        tokenizer = pipe.tokenizer_2
        limit = request.max_sequence_length
    else:
        tokenizer = pipe.tokenizer
        limit = tokenizer.model_max_length
    for prompt in (request.prompt, negative_prompt or ""):
        check_prompt(tokenizer, limit, prompt)


def check_prompt(tokenizer: Any, limit: int, prompt: str) -> None:
    """Refuse unknown words, and a prompt with more tokens than a limit.

    Raises:
        PromptError: names the words with similar ones, or the number of tokens.
    """
    words = dict.fromkeys(re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", prompt))
    unknown = [word for word in words if _is_unknown(tokenizer, word)]
    if unknown:
        vocabulary = [token.removesuffix("</w>") for token in tokenizer.get_vocab()]
        vocabulary = [token for token in vocabulary if re.match(r"\w", token)]
        described = " and ".join(_describe(word, vocabulary) for word in unknown)
        raise PromptError(
            f"the model does not know {described}; use words of its vocabulary.", unknown
        )
    length = len(tokenizer(prompt, truncation=False).input_ids)
    if length > limit:
        raise PromptError(
            f"the prompt has {length} tokens, and the model reads {limit}; shorten it."
        )


def _is_unknown(tokenizer: Any, word: str) -> bool:
    return tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids


def _describe(word: str, vocabulary: list[str]) -> str:
    """Quote an unknown word, with similar ones of the vocabulary."""
    similar = difflib.get_close_matches(word.lower(), vocabulary, 2, 0.6)
    return repr(word) + (f" (similar: {', '.join(similar)})" if similar else "")
