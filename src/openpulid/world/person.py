"""Procedural people: thirty-one numbers make a face, and none of them has a name in any prompt."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

HELD_OUT_PEOPLE = 1_000_000
"""Seeds from here on belong to people that no training has seen."""


@dataclass(frozen=True)
class Person:
    """The identity of one procedural person: every field is a value in [0, 1].

    Hair, beard, expression, glasses and clothes are not here: they belong to the `Scene`, so that nothing but the face
    tells one person from another.
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
        """The person of a seed: the same on every machine. Seeds from `HELD_OUT_PEOPLE` on are never trained on."""
        return cls.sample(torch.Generator().manual_seed(seed))

    @classmethod
    def sample(cls, generator: torch.Generator) -> Person:
        """A person drawn uniformly from the whole space."""
        return cls.from_vector(torch.rand(len(PARAMETERS), generator=generator).tolist())

    @classmethod
    def from_vector(cls, values: list[float]) -> Person:
        """The inverse of `vector`."""
        return cls(**dict(zip(PARAMETERS, values, strict=True)))

    def vector(self) -> list[float]:
        """The values in the order of `PARAMETERS`."""
        return list(dataclasses.astuple(self))

    def replace(self, **values: float) -> Person:
        """The same person with some values changed."""
        return dataclasses.replace(self, **values)

    def sibling(self, generator: torch.Generator, changes: int) -> Person:
        """Somebody who shares skin and face except for `changes` facial values, each moved by at least 0.4.

        Such pairs are the hard negatives of the recognisers: only the changed feature tells them apart.
        """
        chosen = torch.randperm(len(FACIAL), generator=generator)[:changes]
        moved = {}
        for index in chosen.tolist():
            value = getattr(self, FACIAL[index])
            shift = 0.4 + 0.2 * torch.rand((), generator=generator).item()
            room_above, room_below = 1 - value, value
            moved[FACIAL[index]] = value + shift if room_above > room_below else value - shift
            moved[FACIAL[index]] = min(max(moved[FACIAL[index]], 0.0), 1.0)
        return self.replace(**moved)


PARAMETERS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(Person))
SKIN = ("skin_tone", "skin_warmth")
FACIAL: tuple[str, ...] = tuple(name for name in PARAMETERS if name not in SKIN)
"""What a recogniser has to see: everything but the skin, which lamps and film change too."""
