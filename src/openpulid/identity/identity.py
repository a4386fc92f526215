"""Who somebody is, as features: what a face recogniser and a vision tower saw in one or several photos.

Features, not tokens: one file serves every encoder. It names the models that made it, and it is biometric
data: the file can be read by its owner only, and nothing of it is ever logged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from openpulid.errors import IdentityError

FORMAT = "openpulid.identity/1"


@dataclass(frozen=True, eq=False)
class Identity:
    """One person. n photos, C width of the joined embeddings, N patches and D width of the vision tower.

    Attributes:
        id_cond: (1, n, C) raw face embedding and normalised vision embedding, joined.
        hidden: five times (1, n * (1 + N), D), the tower's levels, each photo's class token first.
        models: name -> hash of the models that made the features.
        created: UTC time, ISO 8601.
    """

    id_cond: Tensor
    hidden: tuple[Tensor, ...]
    models: Mapping[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        if self.id_cond.ndim != 3 or len(self.id_cond) != 1 or any(x.ndim != 3 or len(x) != 1 for x in self.hidden):
            raise IdentityError("an identity holds one person: id_cond (1, photos, C) and hidden levels (1, tokens, D).")

    def __repr__(self) -> str:
        return f"Identity({self.photos} photo{'s' * (self.photos != 1)}, made by {', '.join(self.models) or 'unknown'})"

    @property
    def photos(self) -> int:
        """How many photos it was made from."""
        return self.id_cond.shape[1]

    def zeros_like(self) -> Identity:
        """Nobody: the same shapes, all zero. What guidance compares with."""
        return Identity(torch.zeros_like(self.id_cond), tuple(map(torch.zeros_like, self.hidden)), self.models)

    def to(self, device: str | torch.device, dtype: torch.dtype | None = None) -> Identity:
        """The same features elsewhere or in another dtype."""
        moved = tuple(x.to(device, dtype) for x in self.hidden)
        return Identity(self.id_cond.to(device, dtype), moved, self.models, self.created)

    def require(self, models: Mapping[str, str]) -> None:
        """Checks that these models made it.

        Raises:
            IdentityError: others did, so the numbers mean something else.
        """
        differing = sorted(name for name in {*models, *self.models} if models.get(name) != self.models.get(name))
        if differing:
            raise IdentityError(
                f"this identity was made by another {' and another '.join(differing)} than this preset uses; "
                "make it again from the photo with this preset."
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes one safetensors file that only its owner can read (mode 0600). It appears whole or not at all."""
        path = Path(path)
        tensors = {"id_cond": self.id_cond, **{f"hidden.{i}": x for i, x in enumerate(self.hidden)}}
        metadata = {"format": FORMAT, "created": self.created, "models": json.dumps(dict(self.models))}
        data = save({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, metadata=metadata)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            # the mode is set as the file is made: at no moment can others read it
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise IdentityError(f"{path} cannot be written ({error.strerror}); choose another place.") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], models: Mapping[str, str] | None = None) -> Identity:
        """Reads what `save` wrote.

        Args:
            path: the file.
            models: name -> hash that must have made it; None takes any.

        Raises:
            IdentityError: no such file, not an identity, or made by other models.
        """
        if not Path(path).is_file():
            raise IdentityError(f"{path} does not exist; `pulid identify PHOTO -o {Path(path).name}` makes it.")
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise IdentityError(f"{path} is not an identity file; `pulid identify PHOTO -o FILE` makes one.") from error
        levels = [name for name in sorted(tensors) if name.startswith("hidden.")]
        if facts.get("format") != FORMAT or "id_cond" not in tensors:
            raise IdentityError(f"{path} is not an identity file; `pulid identify PHOTO -o FILE` makes one.")
        hidden = tuple(tensors[name] for name in levels)
        identity = cls(tensors["id_cond"], hidden, json.loads(facts["models"]), facts["created"])
        if models is not None:
            identity.require(models)
        return identity


def concat(identities: Sequence[Identity]) -> Identity:
    """Several photos of one person as one identity: the encoders read all of them."""
    first = identities[0]
    for other in identities[1:]:
        other.require(first.models)
    levels = zip(*(identity.hidden for identity in identities), strict=True)
    return Identity(
        torch.cat([identity.id_cond for identity in identities], dim=1),
        tuple(torch.cat(level, dim=1) for level in levels),
        first.models,
    )
