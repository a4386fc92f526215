"""Random numbers depend on seed, step and name alone; ranks share one global batch."""

import pytest
import torch

from openpulid.errors import OptionError
from openpulid.training.rng import StepRNG


def test_same_key_gives_same_numbers():
    assert torch.equal(StepRNG(1, 5).randn((3, 2)), StepRNG(1, 5).randn((3, 2)))
    assert not torch.equal(StepRNG(1, 5).randn((3, 2)), StepRNG(1, 6).randn((3, 2)))
    assert not torch.equal(StepRNG(1, 5).randn((3, 2)), StepRNG(2, 5).randn((3, 2)))


def test_unnamed_draws_are_independent_and_named_ones_ignore_the_order():
    draw = StepRNG(0, 0)
    assert not torch.equal(draw.randn((4,)), draw.randn((4,)))
    assert torch.equal(draw.randn((4,), "noise"), StepRNG(0, 0).randn((4,), "noise"))


def test_ranks_share_the_global_batch():
    def all_of(world):
        draws = [StepRNG(3, 7, rank, world) for rank in range(world)]
        part = 8 // world
        return [
            torch.cat([d.indices(100, 8) for d in draws]),
            torch.cat([d.randn((part, 2)) for d in draws]),
            torch.cat([d.rand((part,)) for d in draws]),
            torch.cat([d.randint(1000, (part,)) for d in draws]),
        ]

    for one, four in zip(all_of(1), all_of(4), strict=True):
        assert torch.equal(one, four)


def test_epoch_is_a_permutation():
    seen = torch.cat([StepRNG(0, step).indices(10, 4) for step in range(5)])
    assert sorted(seen[:10].tolist()) == list(range(10)) == sorted(seen[10:].tolist())
    assert StepRNG(0, 0).indices(3, 8).bincount().tolist() != [8, 0, 0]


def test_recorded_draws_match():
    draw = StepRNG(0, 0, recorded={})
    x, i = draw.randn((2,), "noise"), draw.indices(5, 2)
    assert torch.equal(draw.recorded["noise"], x) and torch.equal(draw.recorded["data.indices"], i)


def test_uneven_batch_raises():
    with pytest.raises(OptionError, match="cannot be shared"):
        StepRNG(0, 0, 0, 3).indices(10, 8)
