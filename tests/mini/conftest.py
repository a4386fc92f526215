"""A few rendered images in the form of a `WorldDataset`, so that tests need none on disk."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from openpulid.world import ATTRIBUTES, Person, Scene, render


@dataclass
class SmallWorld:
    """Two families of two people in three scenes each, with the arrays of a `WorldDataset`."""

    images: np.ndarray
    parts: np.ndarray
    landmarks: np.ndarray
    people: np.ndarray
    families: np.ndarray
    vectors: np.ndarray
    attributes: np.ndarray
    key: dict[str, object] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def render(cls, seed: int = 0) -> SmallWorld:
        generator = torch.Generator().manual_seed(seed)
        people = []
        for family in range(2):
            first = Person.from_seed(seed + family)
            people += [first, first.sibling(generator, 3)]
        repeated = [person for person in people for _ in range(3)]
        scenes = [Scene.sample(generator) for _ in repeated]
        rendering = render(repeated, scenes, size=96)
        return cls(
            images=(rendering.image * 255).round().byte().numpy(),
            parts=rendering.parts.numpy(),
            landmarks=rendering.landmarks.numpy(),
            people=np.repeat(np.arange(4), 3),
            families=np.repeat(np.arange(2), 6),
            vectors=np.array([person.vector() for person in repeated], dtype=np.float32),
            attributes=np.zeros((12, len(ATTRIBUTES)), dtype=np.int8),
        )


@pytest.fixture(scope="session")
def small_world() -> SmallWorld:
    return SmallWorld.render()
