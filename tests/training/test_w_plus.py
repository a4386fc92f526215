"""How W+ Adapter's training disturbs the latents of other people."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

from openpulid.errors import OptionError
from openpulid.training.w_plus import disturb_latents
from openpulid.training.w_plus.disturbance import KINDS, LARGEST_FACTORS, SHARES

COUNT, WIDTH = 6000, 10
MARK, NUMBER, SQUARE, FIRST, SECOND, REST = 0, 1, 2, 3, 4, slice(5, WIDTH)
"""Columns: of a mark, an image's number and its square, two directions, and noise alone."""


def random(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def numbered(count: int = COUNT) -> Tensor:
    """Return latents (count, 18, WIDTH) that tell from whom they are: the image's number."""
    latents = torch.zeros(count, 18, WIDTH, dtype=torch.float64)
    numbers = torch.arange(count, dtype=torch.float64)[:, None] / count
    latents[..., MARK] = 1
    latents[..., NUMBER] = numbers
    latents[..., SQUARE] = numbers**2
    return latents


def unit_directions() -> Tensor:
    directions = torch.zeros(2, 18, WIDTH)
    directions[0, :, FIRST] = 1
    directions[1, :, SECOND] = 1
    return directions


def read_kinds(disturbed: Tensor) -> Tensor:
    """Return the index in `KINDS` of each image, from what was added to the latents."""
    has_noise = disturbed[..., REST].abs().amax((1, 2)) > 0
    num_directions = (disturbed[:, 0, [FIRST, SECOND]] != 0).sum(-1)
    is_marked = (disturbed[:, 0, MARK] - 1).abs() > 1e-4  # `own` alone adds a mark
    kinds = torch.full((len(disturbed),), KINDS.index("extrapolate"))
    kinds[is_marked] = KINDS.index("own")
    kinds[num_directions == 1] = KINDS.index("direction")
    kinds[num_directions == 2] = KINDS.index("mix")
    kinds[has_noise] = KINDS.index("noise")
    return kinds


@pytest.mark.parametrize("has_directions", [True, False])
def test_kinds_have_their_shares(has_directions: bool) -> None:
    directions = unit_directions() if has_directions else None
    kinds = read_kinds(disturb_latents(numbered(), random(), directions))
    shares = kinds.bincount(minlength=len(KINDS)) / COUNT
    kinds_left = KINDS if has_directions else KINDS[:3]
    total = sum(SHARES[kind] for kind in kinds_left)
    for index, kind in enumerate(KINDS):
        expected = SHARES[kind] / total if kind in kinds_left else 0.0
        assert abs(shares[index] - expected) < 0.02, kind
    assert sum(SHARES.values()) == pytest.approx(1)
    none = disturb_latents(numbered(), random(), unit_directions()[:0])
    assert torch.equal(none, disturb_latents(numbered(), random()))


def test_factors_are_uniform_in_their_ranges() -> None:
    latents = numbered()
    disturbed = disturb_latents(latents, random(), unit_directions())
    kinds = read_kinds(disturbed)
    number, square = latents[:, 0, NUMBER], latents[:, 0, SQUARE]
    mixed = disturbed[:, 0, FIRST] + disturbed[:, 0, SECOND]
    # o + t (o - w): with the squares, the number of o follows from both columns
    rise = disturbed[:, 0, NUMBER] - number
    other = (disturbed[:, 0, SQUARE] - square) / rise - number
    factors = {
        "extrapolate": rise / (other - number) - 1,
        "own": disturbed[:, 0, MARK] - 1,
        "direction": mixed,
        "mix": mixed,
    }
    for kind, values in factors.items():
        chosen = values[kinds == KINDS.index(kind)].double()
        if kind == "extrapolate":  # float32 loses those of people with almost one number
            chosen = chosen[(other - number)[kinds == KINDS.index(kind)].abs() > 0.05]
        limit = LARGEST_FACTORS[kind]
        assert chosen.abs().max() <= limit * 1.01
        assert chosen.max() > 0.95 * limit and chosen.min() < -0.95 * limit
        spread = 0.577 * limit  # of a uniform distribution
        assert abs(chosen.std() / spread - 1) < 0.1 and abs(chosen.mean()) < 0.15 * limit, kind
    noise = disturbed[kinds == KINDS.index("noise")][..., REST]
    sizes = noise.flatten(1).std(-1)
    assert 6.5 < sizes.max() < 8 * 1.2 and sizes.min() < 0.5
    assert abs(sizes.mean() - 4) < 0.4


def test_factor_is_one_for_all_latents_of_an_image() -> None:
    disturbed = disturb_latents(numbered(), random(), unit_directions())
    others = disturbed[read_kinds(disturbed) != KINDS.index("noise")]
    assert torch.equal(others, others[:, :1].expand_as(others))


@pytest.mark.parametrize("count", [2, 3, 50])
def test_each_image_gets_another_person_and_each_person_is_used_once(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in KINDS:
        monkeypatch.setitem(LARGEST_FACTORS, kind, 0.0)
    latents = numbered(count)
    orders = set()
    for seed in range(20):
        disturbed = disturb_latents(latents, random(seed), unit_directions())
        people = (disturbed[:, 0, NUMBER] * count).round().long()
        assert sorted(people.tolist()) == list(range(count))
        assert not (people == torch.arange(count)).any()
        orders.add(tuple(people.tolist()))
    assert len(orders) == {2: 1, 3: 2}.get(count, 20)


def test_single_image_is_disturbed_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LARGEST_FACTORS, "noise", 0.0)
    latents = torch.ones(1, 18, WIDTH)
    for seed in range(20):
        disturbed = disturb_latents(latents, random(seed))
        assert torch.equal(disturbed, disturbed[:, :1, :1].expand_as(disturbed))


def test_mix_is_between_two_directions() -> None:
    disturbed = disturb_latents(numbered(), random(), unit_directions())
    mixed = disturbed[read_kinds(disturbed) == KINDS.index("mix")][:, 0, [FIRST, SECOND]]
    assert (mixed.prod(-1) > 0).all()  # both with the sign of the factor
    weights = mixed[:, 0] / mixed.sum(-1)
    assert abs(weights.mean() - 0.5) < 0.05 and weights.min() < 0.05 and weights.max() > 0.95
    # with one direction alone, a mix is that direction
    alone = disturb_latents(numbered(), random(), unit_directions()[:1])
    without_noise = alone[alone[..., REST].abs().amax((1, 2)) == 0]
    assert not without_noise[..., SECOND].any()
    expected = (SHARES["direction"] + SHARES["mix"]) * COUNT
    assert abs(without_noise[:, 0, FIRST].count_nonzero() - expected) < 0.02 * COUNT


def test_generator_decides_alone() -> None:
    latents, directions = numbered(40), unit_directions()
    before = torch.random.get_rng_state()
    one = disturb_latents(latents, random(3), directions)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(disturb_latents(latents, random(3), directions), one)
    assert not torch.equal(disturb_latents(latents, random(4), directions), one)
    # what is drawn later depends on the shapes alone
    states = []
    for values in (latents, 0 * latents):
        generator = random(3)
        disturb_latents(values, generator, directions)
        states.append(generator.get_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_gradient_and_nothing_changes_in_place(dtype: torch.dtype) -> None:
    latents = numbered(20).to(dtype).requires_grad_()
    directions = unit_directions().requires_grad_()
    values = latents.detach().clone()
    disturbed = disturb_latents(latents, random(), directions)
    assert disturbed.shape == latents.shape and disturbed.dtype == dtype
    assert not disturbed.requires_grad and disturbed.is_leaf
    assert disturbed.data_ptr() != latents.data_ptr()
    assert torch.equal(latents, values) and torch.equal(directions, unit_directions())
    # a loss with both reaches the latents through the other operand alone
    (latents.float() * disturbed.float()).sum().backward()
    assert latents.grad is not None
    assert torch.equal(latents.grad, disturbed)
    assert directions.grad is None


def test_direction_of_another_shape_is_refused() -> None:
    with pytest.raises(OptionError, match=r"a direction has the shape \(180,\), and the latents"):
        disturb_latents(numbered(2), random(), unit_directions().flatten(1))
