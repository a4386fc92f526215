"""Every measure against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from openpulid.bench import metrics
from openpulid.bench.metrics import Faces


def faces(embeddings: list[list[float]], found: list[bool] | None = None, size: int = 2) -> Faces:
    count = len(embeddings)
    return Faces(torch.tensor(found or [True] * count), torch.tensor(embeddings), torch.zeros(count, 1, size, size))


def test_face_sim_is_a_cosine_and_zero_without_a_face() -> None:
    seen = faces([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [1.0, 0.0]], [True, True, True, False])
    references = torch.tensor([[1.0, 0.0], [0.0, -5.0], [7.0, 0.0], [1.0, 0.0]])
    assert metrics.face_sim(seen, references).tolist() == pytest.approx([0.6, -1.0, 1.0, 0.0])


def test_rank1_takes_the_nearest_by_angle() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 10.0], [-1.0, -1.0]])
    seen = faces([[5.0, 4.0], [1.0, 2.0], [-3.0, -2.0], [1.0, 0.0]], [True, True, True, False])
    assert metrics.rank1(seen, gallery, torch.tensor([0, 0, 2, 0])).tolist() == [1, 0, 1, 0]


def test_face_found_counts() -> None:
    assert metrics.face_found(faces([[1.0], [1.0]], [True, False])).tolist() == [1, 0]


def test_clip_t_is_a_hundred_cosines() -> None:
    texts = {"a": [1.0, 0.0], "b": [0.0, 1.0]}
    images = torch.zeros(2, 3, 4, 4)
    got = metrics.clip_t(
        lambda x: torch.tensor([[3.0, 4.0], [3.0, 4.0]]),
        lambda prompts: torch.tensor([texts[prompt] for prompt in prompts]),
        images,
        ["a", "b"],
    )
    assert got.tolist() == pytest.approx([60.0, 80.0])


def test_clip_i_compares_with_and_without() -> None:
    def embed(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :2]

    after = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    before = torch.tensor([[2.0, 0.0], [1.0, 0.0]]).view(2, 1, 1, 2)
    assert metrics.clip_i(embed, after, before).tolist() == pytest.approx([1.0, math.sqrt(0.5)])


def test_outside_face_leaves_out_both_faces() -> None:
    before = torch.zeros(1, 3, 2, 2)
    after = torch.zeros(1, 3, 2, 2)
    after[0, :, 0, 0] = 1.0  # in the face of the first image
    after[0, :, 0, 1] = 1.0  # in the face of the second
    after[0, 0, 1, 0] = 0.9  # outside: one of three channels by 0.9, so 0.3
    one, two = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    one[0, 0, 0, 0] = two[0, 0, 0, 1] = 1
    seen, was = (Faces(torch.tensor([True]), torch.zeros(1, 1), mask) for mask in (one, two))
    assert metrics.outside_face(after, before, seen, was).tolist() == pytest.approx([0.3 / 2])


def test_outside_face_of_an_image_that_is_all_face_is_zero() -> None:
    all_face = Faces(torch.tensor([True]), torch.zeros(1, 1), torch.ones(1, 1, 2, 2))
    got = metrics.outside_face(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), all_face, all_face)
    assert got.tolist() == [0]


def test_attributes_counts_only_what_is_asked() -> None:
    scores = {
        "hat": torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.0, 1.0]]),
        "pose": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
    }
    wanted = [{"hat": 1, "pose": 2}, {"pose": 2}, {}]
    got = metrics.attributes(lambda images: scores, torch.zeros(3, 3, 4, 4), wanted)
    assert got[:2].tolist() == [0.5, 1.0]
    assert got[2].isnan()


def test_bootstrap_weighs_people_not_images() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, 0.0, float("nan")])
    people = torch.tensor([7, 7, 7, 9, 9])
    got = metrics.bootstrap(values, people)
    assert got.mean == 0.5
    assert (got.low, got.high) == (0.0, 1.0)  # two people: a quarter of all draws is twice the same


def test_bootstrap_interval_is_about_two_standard_errors() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1))
    got = metrics.bootstrap(values, torch.arange(400))
    error = values.std().item() / 20
    assert got.mean == pytest.approx(values.mean().item(), abs=1e-6)
    assert got.high - got.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert metrics.bootstrap(values, torch.arange(400)) == got


def test_bootstrap_of_nothing_is_nan() -> None:
    assert math.isnan(metrics.bootstrap(torch.tensor([float("nan")]), torch.tensor([0])).mean)
