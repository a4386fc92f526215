"""Whose features go with which picture."""

from __future__ import annotations

import torch

from openpulid.mini.adapter import Mixture, mates, rows_by_person
from openpulid.training.data import Draw


def test_a_mate_is_another_picture_of_the_same_person() -> None:
    people = torch.tensor([7, 7, 2, 7, 9, 2])
    of_person = rows_by_person(people)
    assert [rows.tolist() for rows in of_person] == [[0, 1, 3], [0, 1, 3], [2, 5], [0, 1, 3], [4], [2, 5]]
    rows = torch.tensor([0, 1, 2, 3, 4, 5] * 50)
    found = mates(rows, of_person, Draw(0, 0))
    assert torch.equal(people[found], people[rows])
    alone = rows == 4
    assert (found[alone] == 4).all() and (found[~alone] != rows[~alone]).all()
    assert set(found[rows == 0].tolist()) == {1, 3}  # any of them
    assert torch.equal(found, mates(rows, of_person, Draw(0, 0)))
    assert not torch.equal(found, mates(rows, of_person, Draw(0, 1)))


class Named:
    def __init__(self, name: str) -> None:
        self.name = name

    def batch(self, draw: Draw) -> str:
        return self.name


def test_a_mixture_takes_its_sources_equally_often_and_the_same_on_every_rank() -> None:
    mixture = Mixture([Named("world"), Named("portraits")])  # type: ignore[list-item]
    taken = [mixture.batch(Draw(0, step)) for step in range(400)]
    assert 160 < taken.count("world") < 240
    assert taken == [mixture.batch(Draw(0, step, rank=1, world=2)) for step in range(400)]
