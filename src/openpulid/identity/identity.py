"""Who somebody is, as features: what a face recogniser and a vision tower saw in one or several photos.

Features, not tokens: one file serves every encoder. It names the models that made it, and it is biometric
data: the file can be read by its owner only, and nothing of it is ever logged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from openpulid.errors import IdentityError, OptionError

FORMAT = "openpulid.identity/1"


@dataclass(frozen=True, eq=False)
class Identity:
    """One person. n photos that are read, C width of the joined embeddings, N patches and D width of the vision tower.

    Attributes:
        id_cond: (1, n, C) raw face embedding and normalised vision embedding, joined.
        hidden: five times (1, n * (1 + N), D), the tower's levels, each photo's class token first.
        landmarks: (1, n, 5, 2), where eyes, nose and corners of the mouth are in each photo, from 0 to 1 across the longer
            side of it, the photo in the middle of a square; None in files that were written before.
        models: name -> hash of the models that made the features.
        created: UTC time, ISO 8601.
        made_from: how many photos it was made from, also where only their mean is left; n by default.
    """

    id_cond: Tensor
    hidden: tuple[Tensor, ...]
    models: Mapping[str, str] = field(default_factory=dict)
    landmarks: Tensor | None = None
    created: str = field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds")
    )
    made_from: int = 0

    def __post_init__(self) -> None:
        if (
            self.id_cond.ndim != 3
            or len(self.id_cond) != 1
            or any(x.ndim != 3 or len(x) != 1 for x in self.hidden)
        ):
            raise IdentityError(
                "an identity holds one person: id_cond (1, photos, C) and hidden levels (1, tokens, D)."
            )
        if not self.made_from:
            object.__setattr__(self, "made_from", self.photos)  # frozen for everybody else

    def __repr__(self) -> str:
        return f"Identity({self.made_from} photo{'s' * (self.made_from != 1)}, made by {', '.join(self.models) or 'unknown'})"

    @property
    def photos(self) -> int:
        """How many photos the features are of: of a mean, one."""
        return self.id_cond.shape[1]

    def zeros_like(self) -> Identity:
        """Nobody: the same shapes, all zero. What guidance compares with."""
        return replace(
            self,
            id_cond=torch.zeros_like(self.id_cond),
            hidden=tuple(map(torch.zeros_like, self.hidden)),
        )

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Identity:
        """The same features elsewhere or in another dtype."""
        moved = tuple(x.to(device, dtype) for x in self.hidden)
        return replace(self, id_cond=self.id_cond.to(device, dtype), hidden=moved)

    def require(self, models: Mapping[str, str]) -> None:
        """Checks that these models made it.

        Raises:
            IdentityError: others did, so the numbers mean something else.
        """
        if differing := mismatched_models(self.models, models):
            raise IdentityError(
                f"this identity was made by another {' and another '.join(differing)} than this preset uses; "
                "make it again from the photo with this preset."
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one safetensors file that only its owner can read (mode 0600). It appears whole or not at all."""
        path = Path(path)
        tensors = {"id_cond": self.id_cond, **{f"hidden.{i}": x for i, x in enumerate(self.hidden)}}
        if self.landmarks is not None:
            tensors["landmarks"] = self.landmarks
        facts = {
            "created": self.created,
            "photos": str(self.made_from),
            "models": json.dumps(dict(self.models)),
        }
        data = save(
            {name: x.detach().cpu().contiguous() for name, x in tensors.items()},
            metadata={"format": FORMAT, **facts},
        )
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            # the mode is set as the file is made: at no moment can others read it
            with os.fdopen(
                os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb"
            ) as file:
                file.write(data)
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise IdentityError(
                f"{path} cannot be written ({error.strerror}); choose another place."
            ) from error
        return path

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], models: Mapping[str, str] | None = None
    ) -> Identity:
        """Reads what `save` wrote.

        Args:
            path: the file.
            models: name -> hash that must have made it; None takes any.

        Raises:
            IdentityError: no such file, not an identity, or made by other models.
        """
        if not Path(path).is_file():
            raise IdentityError(
                f"{path} does not exist; `pulid identify PHOTO -o {Path(path).name}` makes it."
            )
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise IdentityError(
                f"{path} is not an identity file; `pulid identify PHOTO -o FILE` makes one."
            ) from error
        levels = [name for name in sorted(tensors) if name.startswith("hidden.")]
        if facts.get("format") != FORMAT or "id_cond" not in tensors:
            raise IdentityError(
                f"{path} is not an identity file; `pulid identify PHOTO -o FILE` makes one."
            )
        identity = cls(
            tensors["id_cond"],
            tuple(tensors[name] for name in levels),
            models=json.loads(facts["models"]),
            landmarks=tensors.get("landmarks"),
            created=facts["created"],
            made_from=int(facts.get("photos", 0)),  # files that were written before do not say
        )
        if models is not None:
            identity.require(models)
        return identity


def mismatched_models(known: Mapping[str, str], models: Mapping[str, str]) -> list[str]:
    """The names of models whose fingerprints differ, or that only one side has."""
    return sorted(name for name in {*known, *models} if known.get(name) != models.get(name))


FUSIONS = ("concat", "mean", "norm_id", "max_norm")


def fuse_identities(
    identities: Sequence[Identity], fusion: str = "concat", weights: Sequence[float] | None = None
) -> Identity:
    """Several photos of one person, or several people, as one identity.

    - concat: the encoders read all photos; one identity with as many.
    - mean: of the features, weighted.
    - norm_id: the same, each photo also weighted by how long its raw embedding by the face recogniser is, which says how
      clear the photo is.
    - max_norm: the one whose embedding is the longest, weighted: the clearest.

    Args:
        identities: made by the same models; for all but concat of as many photos each.
        weights: one per identity, at least 0, some above; for all but concat. All alike by default.

    Raises:
        OptionError: an unknown fusion, or weights that do not fit.
        IdentityError: other models made one of them, or they have different numbers of photos.
    """
    _check_fusion(identities, fusion, weights)
    if fusion == "concat":
        return concat_identities(identities)
    first = identities[0]
    share = torch.tensor(
        list(weights) if weights else [1.0] * len(identities), dtype=first.id_cond.dtype
    )
    if fusion != "mean":
        share = share * torch.stack([_clarity(identity) for identity in identities])
    if fusion == "max_norm":
        return identities[int(share.argmax())]
    share = share / share.sum()

    def mean(values: Sequence[Tensor]) -> Tensor:
        return sum(
            (s * value for s, value in zip(share, values, strict=True)), torch.zeros_like(values[0])
        )

    levels = zip(*(identity.hidden for identity in identities), strict=True)
    id_cond, hidden = mean([i.id_cond for i in identities]), tuple(mean(level) for level in levels)
    return replace(
        first, id_cond=id_cond, hidden=hidden, made_from=sum(i.made_from for i in identities)
    )


def blend_identities(one: Identity, other: Identity, share: float = 0.5) -> Identity:
    """Somebody between two people: `share` of the other, from 0 to 1. Raises as `fused`."""
    if not 0 <= share <= 1:
        raise OptionError(f"the share of the other person is between 0 and 1; it is {share}.")
    return fuse_identities([one, other], "mean", [1 - share, share])


def _check_fusion(
    identities: Sequence[Identity], fusion: str, weights: Sequence[float] | None
) -> None:
    if fusion not in FUSIONS:
        raise OptionError(
            f"photos are not put together by {fusion!r}; the known ways are {', '.join(FUSIONS)}."
        )
    if not identities:
        raise OptionError("an identity needs at least one picture.")
    if weights is not None and (
        fusion == "concat"
        or len(weights) != len(identities)
        or min(weights) < 0
        or sum(weights) <= 0
    ):
        raise OptionError(
            "weights are one number per photo, none below 0 and not all 0, and concat takes none."
        )
    if fusion != "concat" and len({identity.photos for identity in identities}) > 1:
        raise IdentityError(
            "identities of different numbers of photos have no mean; use concat, or take one photo of each."
        )
    for other in identities[1:]:
        other.require(identities[0].models)


def _clarity(identity: Identity) -> Tensor:
    """The length of the recogniser's embedding: of the two that are joined, PuLID's tower's has the length 1. Of methods with a
    CLIP tower, whose embedding has any length, it is both's.
    """
    return (identity.id_cond.square().sum(-1) - 1).clamp(min=1e-6).sqrt().mean()


def concat_identities(identities: Sequence[Identity]) -> Identity:
    """Several photos of one person as one identity: the encoders read all of them."""
    first = identities[0]
    for other in identities[1:]:
        other.require(first.models)
    levels = zip(*(identity.hidden for identity in identities), strict=True)
    marks = [identity.landmarks for identity in identities if identity.landmarks is not None]
    return replace(
        first,
        id_cond=torch.cat([identity.id_cond for identity in identities], dim=1),
        hidden=tuple(torch.cat(level, dim=1) for level in levels),
        landmarks=torch.cat(marks, dim=1) if len(marks) == len(identities) else None,
        made_from=sum(identity.made_from for identity in identities),
    )
