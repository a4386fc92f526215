"""Options of `pulid data prepare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from openpulid.errors import OptionError

MINI_FACES = "mini"
"""The `faces` of the synthetic people."""

PeopleSource = Literal["faces", "folders", "none"]
IdentityWords = Literal["remove", "flag", "keep"]


@dataclass(frozen=True)
class Filters:
    """Which images are dropped. Angles are in degrees, sizes in pixels of the source image.

    Attributes:
        min_face: smallest face.
        max_faces: largest number of faces.
        min_score: least confidence of the face detector, 0 to 1.
        min_sharpness: least `faces.quality.sharpness`.
        max_yaw: how far the head is turned to a side; see `faces.head_pose`.
        max_pitch: how far it looks up or down.
        max_roll: how far it is tilted.
        max_occlusion: largest hidden part of the face, 0 to 1; with 1, faces are not parsed.
        min_side: shorter side of the crop.
        max_aspect: longer over shorter side of the image.
    """

    min_face: int = 112
    max_faces: int = 1
    min_score: float = 0.6
    min_sharpness: float = 0.01
    max_yaw: float = 60
    max_pitch: float = 45
    max_roll: float = 40
    max_occlusion: float = 0.5
    min_side: int = 512
    max_aspect: float = 3


@dataclass(frozen=True)
class PrepareOptions:
    """Everything that determines a dataset, next to its sources; and the size of batches.

    Attributes:
        filters: which images are dropped.
        faces: face models: "open", the folder of an insightface pack, "mini" for synthetic people,
            or empty for antelopev2.
        duplicate_bits: two images with perceptual hashes that differ in at most so many of 64 bits
            are duplicates if their faces have `certain_similarity`.
        duplicate_similarity: cosine of the face embeddings from which two images are duplicates
            whatever their hashes.
        people: who an image shows: found by face recognition, the folder of the image, or unknown.
        person_similarity: least mean cosine of the face embeddings of one person.
        captioner: name or folder of a vision-language model; empty to drop images without caption.
        caption_prompt: the text that the model continues, or the question that a chat model
            answers.
        replace_captions: caption all images, and ignore the captions of the sources.
        identity_words: what happens to words of a caption that describe who the person is.
        size: longest of the crop's shorter side in pixels; larger crops are reduced.
        context: longest of the crop's shorter side in sizes of the face.
        quality: of the JPEG files, 1 to 100.
        held_out: part of the people that is held out of training, 0 to 1.
        shard_size: images per shard. The images of a person are in one shard.
        seed: of the split and of the order of people.
        batch: images per batch, which is what a killed worker has to repeat.
    """

    filters: Filters = field(default_factory=Filters)
    faces: str = ""
    duplicate_bits: int = 4
    duplicate_similarity: float = 0.95
    people: PeopleSource = "faces"
    person_similarity: float = 0.4
    captioner: str = "blip2"
    caption_prompt: str = ""
    replace_captions: bool = False
    identity_words: IdentityWords = "remove"
    size: int = 1024
    context: float = 5
    quality: int = 95
    held_out: float = 0.02
    shard_size: int = 1000
    seed: int = 0
    batch: int = 32

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            part: Any = self.filters if hasattr(self.filters, name) else self
            if not low <= getattr(part, name) <= high:
                option = "--" + name.replace("_", "-")
                raise OptionError(
                    f"{option} must be from {low:g} to {high:g}, got {getattr(part, name):g}."
                )

    @property
    def certain_similarity(self) -> float:
        """Cosine of two face embeddings from which they are certainly of one person."""
        return (1 + self.person_similarity) / 2

    @property
    def is_miniature(self) -> bool:
        """Whether the face models are those of the synthetic people."""
        return self.faces == MINI_FACES

    def to_json(self) -> dict[str, Any]:
        """Return all options as JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PrepareOptions:
        """Return options from `to_json`.

        Raises:
            OptionError: they are those of another version of the program.
        """
        try:
            return cls(**{**data, "filters": Filters(**data["filters"])})
        except (KeyError, TypeError):
            raise OptionError("the dataset was prepared by another version of openpulid.") from None


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("min_face", 16, 4096),
    ("max_faces", 1, 1000),
    ("min_score", 0, 1),
    ("min_sharpness", 0, 1),
    ("max_yaw", 0, 90),
    ("max_pitch", 0, 90),
    ("max_roll", 0, 180),
    ("max_occlusion", 0, 1),
    ("min_side", 16, 8192),
    ("max_aspect", 1, 100),
    ("duplicate_bits", 0, 32),
    ("duplicate_similarity", 0, 1),
    ("person_similarity", 0, 1),
    ("size", 64, 8192),
    ("context", 1, 100),
    ("quality", 1, 100),
    ("held_out", 0, 0.9),
    ("shard_size", 1, 1_000_000),
    ("batch", 1, 4096),
)
"""Least and greatest value of each option that is a number."""

MINI_OPTIONS = PrepareOptions(
    filters=Filters(min_face=32, min_side=96), faces=MINI_FACES, person_similarity=0.45
)
"""Defaults for the synthetic people, whose images have 96 pixels."""
