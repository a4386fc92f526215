"""Pairs of people: which portraits are joined, and how."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openpulid.mini.data.pairs import SHARED, PairDataset, join_sides
from openpulid.training import generator_for
from openpulid.world import WorldDataset
from openpulid.world.dataset import Plan, build_dataset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> WorldDataset:
    """Portraits of 100 people; a pair needs the same of 12 backgrounds, 6 lights and 4 styles."""
    plan = Plan(people=100, scenes=2, size=48)
    return build_dataset(tmp_path_factory.mktemp("world"), plan, workers=1, compiled=False)


def test_people_of_a_pair_share_the_scene_but_are_not_the_same(data: WorldDataset) -> None:
    pairs = PairDataset(data, count=10)
    assert len(pairs) == 10
    for left, right in pairs.rows:
        assert data.people[left] != data.people[right]
        scenes = [data.scene(int(row)).attributes() for row in (left, right)]
        assert all(scenes[0].get(name) == scenes[1].get(name) for name in SHARED)
        assert scenes[0].get("pattern", "plain") == "plain"
    assert len(np.unique(pairs.rows)) == 20
    assert np.array_equal(PairDataset(data, count=10).rows, pairs.rows)


def test_prompts_say_what_is_true_of_both(data: WorldDataset) -> None:
    pairs = PairDataset(data, count=10)
    for index in range(10):
        prompt = pairs.scene(index).prompt(generator_for("test", index))
        for scene in (pairs.scene(index).left, pairs.scene(index).right):
            visible = scene.attributes()
            for name, words in (("expression", "smiling"), ("glasses", "sunglasses")):
                if words in prompt:
                    assert visible[name] in ("smile", "sunglasses")
            if "background" in prompt:
                assert f"{visible['background']} background" in prompt


def test_right_person_is_in_front(data: WorldDataset) -> None:
    pairs = PairDataset(data, count=8)
    images, faces = pairs.load(np.arange(8), torch.device("cpu"))
    assert images.shape == (8, 3, 48, 80) and faces.shape == (8, 1, 48, 80)
    left, right = pairs.rows.T
    assert np.allclose(images[..., :32].numpy(), data.images[left][..., :32] / 255)
    assert np.allclose(images[..., -32:].numpy(), data.images[right][..., 16:] / 255)
    shared = images[..., 32:48].numpy()
    parts = data.parts[right][..., :16]
    expected = data.images[right][..., :16] / 255
    where = np.broadcast_to(parts[:, None] > 0, expected.shape)
    assert where.any() and np.allclose(shared[where], expected[where])


def test_background_changes_gradually() -> None:
    left, right = torch.zeros(1, 2, 12, 12), torch.zeros(1, 2, 12, 12)
    right[:, 0] = 1
    left[:, 1, 0] = 1  # the left person covers the first row
    joined = join_sides(left, right)
    row = [0.0] * 8 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 8
    assert torch.allclose(joined[0, 0, 1], torch.tensor(row))
    assert torch.equal(joined[0, 0, 0], torch.tensor([0.0] * 12 + [1.0] * 8))
