"""Which features belong to which image."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from openpulid.mini.train import portraits as portraits_module
from openpulid.mini.train.portraits import (
    FRONTAL_ATTRIBUTES,
    Mixture,
    Portraits,
    find_frontal,
    list_other_views,
    sample_other_views,
)
from openpulid.training.rng import StepRNG
from openpulid.world import ATTRIBUTES


def test_other_view_is_another_image_of_the_same_person() -> None:
    people = torch.tensor([7, 7, 2, 7, 9, 2])
    of_person = list_other_views(people, torch.ones(6, dtype=torch.bool))
    assert [rows.tolist() for rows in of_person] == [[1, 3], [0, 3], [5], [0, 1], [4], [2]]
    rows = torch.tensor([0, 1, 2, 3, 4, 5] * 50)
    found = sample_other_views(rows, of_person, StepRNG(0, 0))
    assert torch.equal(people[found], people[rows])
    alone = rows == 4
    assert (found[alone] == 4).all() and (found[~alone] != rows[~alone]).all()
    assert set(found[rows == 0].tolist()) == {1, 3}  # any of them
    assert torch.equal(found, sample_other_views(rows, of_person, StepRNG(0, 0)))
    assert not torch.equal(found, sample_other_views(rows, of_person, StepRNG(0, 1)))


def test_features_come_from_frontal_images_if_there_are_some() -> None:
    people = torch.tensor([7, 7, 7, 2, 2])
    of_person = list_other_views(people, torch.tensor([False, True, False, False, False]))
    assert [rows.tolist() for rows in of_person] == [[1], [0, 2], [1], [4], [3]]


def test_frontal_images_show_the_whole_face() -> None:
    front, left = ATTRIBUTES["pose"].index("front"), ATTRIBUTES["pose"].index("left")
    seen = np.zeros((4, len(ATTRIBUTES)), dtype=np.int8)
    seen[:] = [
        ATTRIBUTES[name].index(FRONTAL_ATTRIBUTES[name]) if name in FRONTAL_ATTRIBUTES else 1
        for name in ATTRIBUTES
    ]
    assert (seen[:, list(ATTRIBUTES).index("pose")] == front).all()
    seen[1, list(ATTRIBUTES).index("pose")] = left
    seen[2, list(ATTRIBUTES).index("glasses")] = ATTRIBUTES["glasses"].index("sunglasses")
    assert find_frontal(SimpleNamespace(attributes=seen)).tolist() == [True, False, False, True]


def test_id_loss_compares_with_the_image_itself(monkeypatch) -> None:
    """Another image of the person has another pose and expression, which the loss would keep."""
    seen = np.zeros((6, len(ATTRIBUTES)), dtype=np.int8)
    data = WorldPictures(seen)
    asked: list[np.ndarray] = []
    monkeypatch.setattr(
        portraits_module,
        "load_faces",
        lambda data, rows, device: (asked.append(rows), (torch.zeros(len(rows)),))[1],
    )
    portraits = Portraits(data, data, data, data, data, batch_size=6, paired=True)
    portraits.batch(StepRNG(0, 0))
    rows, read = data.asked
    assert (read != rows).all()  # features are of another picture
    assert (asked[0] == rows).all()


class WorldPictures:
    """Six images of two people, and everything that `Portraits` reads of them."""

    def __init__(self, attributes: np.ndarray) -> None:
        self.attributes, self.people = attributes, np.array([0, 0, 0, 1, 1, 1])
        self.landmarks, self.images = np.zeros((6, 5, 2)), np.zeros((6, 3, 8, 8))
        self.tokens, self.asked = torch.zeros(6, 1, 4, dtype=torch.long), []

    def __len__(self) -> int:
        return 6

    def rows(self, rows, other):
        """Rows of latents in the first call, of features in the last."""
        self.asked = [*self.asked[:1], np.asarray(rows)]
        return torch.zeros(len(rows)), torch.zeros(len(rows))

    def batch_decode(self, tokens, skip_special_tokens):
        return [""] * len(tokens)


class Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def batch(self, rng: StepRNG) -> str:
        return self.name


def test_mixture_uses_sources_equally_and_the_same_on_every_rank() -> None:
    mixture = Mixture([Named("world"), Named("portraits")])  # type: ignore[list-item]
    taken = [mixture.batch(StepRNG(0, step)) for step in range(400)]
    assert 160 < taken.count("world") < 240
    assert taken == [mixture.batch(StepRNG(0, step, rank=1, world_size=2)) for step in range(400)]
