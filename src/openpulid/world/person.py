"""Procedural people: 31 numbers determine a face, and no prompt mentions any of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from openpulid.errors import OptionError

HELD_OUT_PEOPLE = 1_000_000
"""Seeds from this number on are people who are held out of training."""


@dataclass(frozen=True)
class Person:
    """The identity of one procedural person; every field is in [0, 1].

    Hair, beard, expression, glasses and clothes belong to the `Scene`, so that only the face
    distinguishes people.
    """

    face_width: float = 0.5
    face_length: float = 0.5
    jaw_width: float = 0.5
    chin_width: float = 0.5
    cheeks: float = 0.5
    eye_distance: float = 0.5
    eye_width: float = 0.5
    eye_opening: float = 0.5
    eye_tilt: float = 0.5
    eye_height: float = 0.5
    iris_hue: float = 0.5
    iris_lightness: float = 0.5
    brow_thickness: float = 0.5
    brow_length: float = 0.5
    brow_arch: float = 0.5
    brow_height: float = 0.5
    brow_angle: float = 0.5
    nose_length: float = 0.5
    nose_width: float = 0.5
    nose_projection: float = 0.5
    nose_tip: float = 0.5
    mouth_width: float = 0.5
    mouth_height: float = 0.5
    upper_lip: float = 0.5
    lower_lip: float = 0.5
    ears: float = 0.5
    age_lines: float = 0.5
    freckles: float = 0.5
    mole: float = 0.5
    skin_tone: float = 0.5
    skin_warmth: float = 0.5

    @classmethod
    def from_seed(cls, seed: int) -> Person:
        """Return the person of a seed, the same on every machine.

        Seeds from `HELD_OUT_PEOPLE` on are not used in training.

        Raises:
            OptionError: the seed does not fit into 64 bits.
        """
        if not 0 <= seed < 2**64:
            raise OptionError(f"the seed of a person must be from 0 to {2**64 - 1}, got {seed}.")
        return cls.sample(torch.Generator().manual_seed(seed))

    @classmethod
    def sample(cls, generator: torch.Generator) -> Person:
        """Sample a person uniformly."""
        return cls.from_vector(torch.rand(len(PARAMETERS), generator=generator).tolist())

    @classmethod
    def from_vector(cls, values: list[float]) -> Person:
        """Create a person from the values of `vector`."""
        return cls(**dict(zip(PARAMETERS, values, strict=True)))

    def vector(self) -> list[float]:
        """Return the values in the order of `PARAMETERS`."""
        return list(dataclasses.astuple(self))

    def replace(self, **values: float) -> Person:
        """Return the person with some values changed."""
        return dataclasses.replace(self, **values)

    def sibling(self, generator: torch.Generator, changes: int) -> Person:
        """Return a person who differs only in some facial values, each by at least 0.4.

        Such pairs are the hard negatives of the face recognition models: only the changed features
        distinguish them.

        Args:
            generator: selects the values and their changes.
            changes: number of values to change.
        """
        indices = torch.randperm(len(FACIAL), generator=generator)[:changes]
        values = {}
        for index in indices.tolist():
            value = getattr(self, FACIAL[index])
            shift = 0.4 + 0.2 * torch.rand((), generator=generator).item()
            if 1 - value <= value:
                shift = -shift
            values[FACIAL[index]] = min(max(value + shift, 0.0), 1.0)
        return self.replace(**values)


PARAMETERS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(Person))
SKIN = ("skin_tone", "skin_warmth")
FACIAL: tuple[str, ...] = tuple(name for name in PARAMETERS if name not in SKIN)
"""Parameters that identify a person: all but the skin, which light and style also change."""
