"""Identities: the features of a face recognition model and a vision encoder, and their file.

An identity holds features, not tokens, so one file serves every adapter. It names the models that
produced it. It is biometric data: only its owner can read the file, and it is never logged.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import torch
from pydantic import BaseModel, Field, Json, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from openpulid.errors import IdentityError, OptionError, OutputError, suggest
from openpulid.io.checkpoints import fingerprint
from openpulid.io.files import write_bytes
from openpulid.io.hub import AURAFACE, identify_file

FORMAT = "openpulid.identity/1"
UNIT_NORM = 0.01
"""Below this norm of the raw face embedding, its model normalizes its embeddings."""
MAX_FEATURE = float(torch.finfo(torch.float16).max)
"""The largest value of a feature. Those of face models are below 1,000."""


class _Facts(BaseModel):
    """The metadata of an identity file."""

    models: Json[dict[str, str]]
    created: str = Field(max_length=64)
    photos: int = Field(ge=1, le=1_000_000)


@dataclass(frozen=True, eq=False)
class Identity:
    """The features of one person.

    Shapes: n images, C width of the concatenated embeddings, N patches and D width of the vision
    encoder.

    Attributes:
        id_cond: (1, n, C), raw face embedding and normalized vision embedding, concatenated.
        hidden: five hidden states (1, n * (1 + N), D), the class token of each image first.
        models: name -> hash of the models that produced the features.
        landmarks: (1, n, 5, 2), eyes, nose and corners of the mouth in each image, from 0 to 1
            across its longer side, with the image centered in a square; None after a fusion of
            identities without landmarks.
        created: UTC time, ISO 8601.
        num_sources: how many images were combined, also if only their mean is left; n by default.
    """

    id_cond: Tensor
    hidden: tuple[Tensor, ...]
    models: Mapping[str, str] = field(default_factory=dict)
    landmarks: Tensor | None = None
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    num_sources: int = 0

    def __post_init__(self) -> None:
        features = (self.id_cond, *self.hidden)
        if any(x.ndim != 3 or len(x) != 1 or not x.is_floating_point() for x in features):
            raise IdentityError(
                "an identity holds one person: id_cond (1, images, C) and hidden (1, tokens, D)."
            )
        if not all(x.numel() for x in features) or any(
            x.shape[1] % self.photos for x in self.hidden
        ):
            raise IdentityError(
                "the features of an identity are not empty, and have the same number of tokens "
                "for each image."
            )
        if self.landmarks is not None and (
            self.landmarks.ndim != 4 or self.landmarks.shape[2:] != (5, 2)
        ):
            raise IdentityError("the landmarks of an identity have the shape (1, images, 5, 2).")
        if not self.num_sources:
            object.__setattr__(self, "num_sources", self.photos)  # the dataclass is frozen

    def __repr__(self) -> str:
        images = "1 image" if self.num_sources == 1 else f"{self.num_sources} images"
        return f"Identity({images}, models: {', '.join(self.models) or 'unknown'})"

    @property
    def photos(self) -> int:
        """Number of images in the features; 1 for a mean."""
        return self.id_cond.shape[1]

    def zeros_like(self) -> Identity:
        """Return the unconditional identity: the same shapes, all zero."""
        return replace(
            self,
            id_cond=torch.zeros_like(self.id_cond),
            hidden=tuple(map(torch.zeros_like, self.hidden)),
        )

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Identity:
        """Return the features on another device or in another dtype."""
        hidden = tuple(x.to(device, dtype) for x in self.hidden)
        return replace(self, id_cond=self.id_cond.to(device, dtype), hidden=hidden)

    def require(self, models: Mapping[str, str]) -> None:
        """Check that the features were produced by these models.

        Args:
            models: name -> hash.

        Raises:
            IdentityError: other models produced them.
        """
        if differing := find_mismatched_models(self.models, models):
            raise IdentityError(
                f"this identity was created with other models ({', '.join(differing)}); "
                "re-create it from its images with `pulid identify` and this preset."
            )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the features alone: the same if they are saved again.

        It is the same if they are extracted again, too, on the same machine with the same number of
        threads.
        """
        digest = hashlib.sha256()
        for name, tensor in self._tensors().items():
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.float().numpy().tobytes())
        return digest.hexdigest()

    @property
    def num_bytes(self) -> int:
        """The size of the features in a file."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        """Return the features on the CPU, by their names in a file."""
        tensors = {"id_cond": self.id_cond, **{f"hidden.{i}": x for i, x in enumerate(self.hidden)}}
        if self.landmarks is not None:
            tensors["landmarks"] = self.landmarks
        return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}

    def check_values(self) -> None:
        """Check that the features are numbers with which networks can compute.

        Raises:
            IdentityError: a value is not finite, or larger than half precision can hold.
        """
        landmarks = () if self.landmarks is None else (self.landmarks,)
        for tensor in (self.id_cond, *self.hidden, *landmarks):
            if not bool((tensor.float().abs() <= MAX_FEATURE).all()):  # false for nan as well
                raise IdentityError(
                    "the features of this identity are not finite, or far too large."
                )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a safetensors file that only its owner can read (mode 0600), atomically.

        Raises:
            IdentityError: the file cannot be written.
        """
        facts = {
            "format": FORMAT,
            "created": self.created,
            "photos": str(self.num_sources),
            "models": json.dumps(dict(self.models)),
        }
        try:
            return write_bytes(path, save(self._tensors(), metadata=facts), private=True)
        except OutputError as error:
            raise IdentityError(str(error)) from error

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], models: Mapping[str, str] | None = None
    ) -> Identity:
        """Read a file of `save`.

        Args:
            path: the file.
            models: name -> hash of the models that must have produced it; None accepts any.

        Raises:
            IdentityError: there is no such file, it is not an identity or is damaged, or other
                models produced it.
        """
        if not os.path.exists(path):
            raise IdentityError(
                f"{path} does not exist; create it: `pulid identify IMAGE -o {Path(path).name}`."
            )
        message = f"{path} is not an identity file; create one: `pulid identify IMAGE -o FILE`."
        if not os.path.isfile(path):
            raise IdentityError(message)
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                names = list(file.keys())
                # cloned: a tensor of the file would change when the file is overwritten
                tensors = {name: file.get_tensor(name).clone() for name in names}
        except OSError as error:
            raise IdentityError(f"{path} cannot be read ({error.strerror or error}).") from error
        except SafetensorError as error:
            raise IdentityError(message) from error
        if facts.get("format") != FORMAT or "id_cond" not in tensors:
            raise IdentityError(message)
        try:
            identity = cls._from_file(facts, tensors)
        except (IdentityError, ValidationError) as error:
            is_metadata = isinstance(error, ValidationError)
            reason = "its metadata are invalid" if is_metadata else str(error).rstrip(".")
            raise IdentityError(
                f"{path} is damaged ({reason}); create it again with `pulid identify`."
            ) from error
        if models is not None:
            identity.require(models)
        return identity

    @classmethod
    def _from_file(cls, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Identity:
        facts = _Facts.model_validate(metadata)
        num_levels = sum(name.startswith("hidden.") for name in tensors)
        names = [f"hidden.{level}" for level in range(num_levels)]
        if not tensors.keys() >= set(names):
            raise IdentityError("a level of its hidden states is missing.")
        identity = cls(
            tensors["id_cond"],
            tuple(tensors[name] for name in names),
            models=facts.models,
            landmarks=tensors.get("landmarks"),
            created=facts.created,
            num_sources=facts.photos,
        )
        identity.check_values()
        return identity


def hash_models(paths: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """Return name -> hash of models, as identities and adapters record them.

    The name is that of the file; AuraFace, whose file has the name of antelopev2's, has its own.
    """
    hashes = {}
    for path in map(Path, paths):
        name = AURAFACE if identify_file(path) == AURAFACE else path.stem
        hashes[name] = fingerprint(path)
    return hashes


def find_mismatched_models(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Return the names of models whose hashes differ, or that only one side has."""
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


FUSIONS = ("concat", "mean", "norm_id", "max_norm")


def fuse_identities(
    identities: Sequence[Identity], fusion: str = "concat", weights: Sequence[float] | None = None
) -> Identity:
    """Combine several images of one person, or several people, into one identity.

    - concat: the encoders receive all images.
    - mean: weighted mean of the features.
    - norm_id: weighted mean; each image is also weighted by the norm of its raw face embedding,
      which measures how clear the image is.
    - max_norm: the identity whose weighted norm is the largest: the clearest image.

    Args:
        identities: produced by the same models; with the same number of images, except for concat.
        fusion: one of `FUSIONS`.
        weights: one per identity, at least 0, not all 0; not for concat. Equal by default.

    Raises:
        OptionError: an unknown fusion, or weights that do not fit.
        IdentityError: other models produced one of them, or their numbers of images differ.
    """
    _check_fusion(identities, fusion, weights)
    if fusion == "concat":
        return concat_identities(identities)
    first = identities[0]
    shares = torch.tensor(
        list(weights) if weights else [1.0] * len(identities),
        dtype=first.id_cond.dtype,
        device=first.id_cond.device,
    )
    if fusion != "mean":
        norms = torch.stack([_embedding_norm(identity) for identity in identities])
        if bool((norms < UNIT_NORM).all()):
            raise OptionError(
                f"{fusion} needs the norms of the face embeddings, and the model of this method "
                "gives embeddings of length 1; use mean or concat."
            )
        shares = shares * norms
    if fusion == "max_norm":
        return identities[int(shares.argmax())]
    shares = shares / shares.sum()

    def mean(values: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(values[0])
        for share, value in zip(shares, values, strict=True):
            total = total + share * value
        return total

    levels = zip(*(identity.hidden for identity in identities), strict=True)
    return replace(
        first,
        id_cond=mean([identity.id_cond for identity in identities]),
        hidden=tuple(mean(level) for level in levels),
        num_sources=sum(identity.num_sources for identity in identities),
    )


def check_fusion(fusion: str) -> None:
    """Raise OptionError if there is no such way to combine images, see `fuse_identities`."""
    if fusion not in FUSIONS:
        raise OptionError(
            f"there is no fusion {fusion!r}{suggest(fusion, FUSIONS)}; "
            f"choose one of {', '.join(FUSIONS)}."
        )


def _check_fusion(
    identities: Sequence[Identity], fusion: str, weights: Sequence[float] | None
) -> None:
    check_fusion(fusion)
    if not identities:
        raise OptionError("an identity needs at least one image.")
    if weights is not None and (
        fusion == "concat"
        or len(weights) != len(identities)
        or not all(map(math.isfinite, weights))
        or min(weights) < 0
        or sum(weights) <= 0
    ):
        raise OptionError(
            "weights must be one number per image, at least 0 and not all 0; concat takes none."
        )
    if fusion != "concat" and len({identity.photos for identity in identities}) > 1:
        raise IdentityError("identities with different numbers of images have no mean; use concat.")
    for other in identities[1:]:
        other.require(identities[0].models)


def _embedding_norm(identity: Identity) -> Tensor:
    """Return the norm of the raw face embedding.

    `id_cond` also contains the vision embedding, whose norm is 1 for PuLID. For methods with a CLIP
    vision encoder, whose embedding has any norm, the result is the norm of both.
    """
    return (identity.id_cond.square().sum(-1) - 1).clamp(min=1e-6).sqrt().mean()


def concat_identities(identities: Sequence[Identity]) -> Identity:
    """Combine several images of one person; the encoders receive all of them.

    Raises:
        IdentityError: other models produced one of them.
    """
    first = identities[0]
    for other in identities[1:]:
        other.require(first.models)
    levels = zip(*(identity.hidden for identity in identities), strict=True)
    landmarks = [identity.landmarks for identity in identities if identity.landmarks is not None]
    return replace(
        first,
        id_cond=torch.cat([identity.id_cond for identity in identities], dim=1),
        hidden=tuple(torch.cat(level, dim=1) for level in levels),
        landmarks=torch.cat(landmarks, dim=1) if len(landmarks) == len(identities) else None,
        num_sources=sum(identity.num_sources for identity in identities),
    )
