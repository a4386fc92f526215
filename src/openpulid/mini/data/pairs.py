"""Images of two people side by side, joined from the portraits of a dataset.

With them the base model learns that a wide image shows two people, so that masks and several people
can be tried with it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from openpulid.mini.data.loading import load_faces
from openpulid.training import generator_for
from openpulid.world import ATTRIBUTES, PARTS, Scene, WorldDataset

OVERLAP = 1 / 3
"""Share of their width by which two portraits overlap: of 96 pixels, they make a pair of 160."""

BACKGROUND = PARTS.index("background")

SHARED = ("background", "pattern", "light", "style")
"""Attributes that both people of a pair have in common."""


@dataclass(frozen=True)
class PairScene:
    """What a prompt says about two people: what is true of both."""

    left: Scene
    right: Scene

    def prompt(self, generator: Generator) -> str:
        """Generate a prompt with random synonyms and order, see `Scene.prompt`."""
        return self.left.prompt(generator, shared_with=self.right)


class PairDataset:
    """Pairs of portraits of different people in front of the same plain background.

    Args:
        data: the portraits.
        count: number of pairs.

    Attributes:
        rows: (count, 2) rows of the left and the right person.
    """

    def __init__(self, data: WorldDataset, count: int) -> None:
        self.data = data
        self.rows = _select_rows(data, count)

    @property
    def key(self) -> dict[str, object]:
        """What determines the images, as JSON values."""
        return {**self.data.key, "pairs": hashlib.sha256(self.rows.tobytes()).hexdigest()}

    def __len__(self) -> int:
        return len(self.rows)

    def scene(self, index: int) -> PairScene:
        """Return what the prompt of a pair can say."""
        left, right = map(self.data.scene, self.rows[index].tolist())
        return PairScene(left, right)

    def load(self, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, S, W) and face masks (B, 1, S, W) of pairs, float in [0, 1]."""
        left, right = (self._load_side(side, device) for side in self.rows[rows].T)
        pair = join_sides(left, right)
        return pair[:, :3], pair[:, 3:4]

    def _load_side(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """Return portraits with the masks of face and person, (B, 5, S, S)."""
        image, face, _ = load_faces(self.data, rows, device)
        parts = torch.from_numpy(self.data.parts[rows]).to(device)[:, None]
        return torch.cat([image, face, (parts != BACKGROUND).float()], dim=1)


def join_sides(left: Tensor, right: Tensor) -> Tensor:
    """Put two portraits side by side. Where they overlap, the right person is in front.

    Args:
        left: (B, C, S, S), of which the last channel is one on the person.
        right: (B, C, S, S) likewise.

    Returns:
        (B, C, S, W), see `OVERLAP`.
    """
    overlap = round(OVERLAP * left.shape[-1])
    behind, before = left[..., -overlap:], right[..., :overlap]
    ramp = (torch.arange(overlap, device=left.device) + 0.5) / overlap
    # the background changes gradually, and the left person covers it
    is_left = behind[:, -1:]
    shared = torch.where(is_left > 0, behind, torch.lerp(behind, before, ramp))
    shared = torch.where(before[:, -1:] > 0, before, shared)
    return torch.cat([left[..., :-overlap], shared, right[..., overlap:]], dim=-1)


def _select_rows(data: WorldDataset, count: int) -> np.ndarray:
    """Select rows with the same `SHARED` attributes and different people, each row once at most.

    Patterns would not continue from one portrait to the other.
    """
    names = list(ATTRIBUTES)
    shared = data.attributes[:, [names.index(name) for name in SHARED]]
    is_plain = data.attributes[:, names.index("pattern")] <= 0
    candidates = np.flatnonzero(is_plain)
    shuffled = torch.randperm(len(candidates), generator=generator_for("pairs", 0)).numpy()
    candidates = candidates[shuffled]
    order = np.lexsort(shared[candidates].T)  # stable, so groups stay shuffled
    rows = candidates[order]
    rows = rows[: len(rows) // 2 * 2].reshape(-1, 2)
    left, right = rows.T
    is_usable = (shared[left] == shared[right]).all(1) & (data.people[left] != data.people[right])
    rows = rows[is_usable]
    chosen = torch.randperm(len(rows), generator=generator_for("pairs", 1)).numpy()
    return rows[np.sort(chosen[:count])]
