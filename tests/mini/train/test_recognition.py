import math

import numpy as np
import pytest
import torch
from torch import nn

from openpulid.faces.mini_recognition import VGGRecognition
from openpulid.mini.train.recognition import (
    MarginHead,
    RecognitionEvaluator,
    RecognitionTask,
    ValueHead,
    _fold_into_head,
    _matrix_power,
    build_family_table,
    compute_auc,
    format_report,
    load_aligned_crops,
    whiten_embeddings,
)
from openpulid.training.rng import StepRNG
from openpulid.world import FACIAL


class Colour(nn.Module):
    """An "embedding" that is the crop's mean colour: it can be foretold."""

    def __init__(self):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()))

    def forward(self, crops):
        return crops.mean((2, 3))


@pytest.fixture
def task(small_world):
    torch.manual_seed(0)
    return RecognitionTask(
        VGGRecognition((8, 8, 16, 16), dim=16), small_world, None, families=2, pictures=6
    )


def test_auc():
    assert compute_auc(torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.2])) == 1.0
    assert compute_auc(torch.tensor([0.5]), torch.tensor([0.5, 0.5])) == 0.5
    assert compute_auc(torch.tensor([0.3, 0.7]), torch.tensor([0.5])) == 0.5
    assert math.isnan(compute_auc(torch.tensor([]), torch.tensor([0.5])))


def test_family_table_repeats_the_pictures_of_smaller_families():
    table = build_family_table(np.array([7, 3, 7, 3, 7, 5]))
    assert table.tolist() == [[1, 3, 1], [5, 5, 5], [0, 2, 4]]


def test_the_margin_is_a_handicap_in_cosine():
    head = MarginHead(2, 2, scale=10.0, margin=0.5, ramp=100)
    head.centres.data = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    embedding, person = torch.tensor([[5.0, 0.0]]), torch.tensor([0])
    assert head(embedding, person, 200).item() == pytest.approx(
        math.log(1 + math.exp(-5.0)), rel=1e-4
    )
    assert head(embedding, person, 150).item() == pytest.approx(
        math.log(1 + math.exp(-7.5)), rel=1e-4
    )
    assert head(embedding, person, 0).item() == pytest.approx(
        math.log(1 + math.exp(-10.0)), rel=1e-2
    )


def test_centres_find_their_people_before_they_teach():
    head, embedding = MarginHead(2, 2, ramp=10), torch.randn(3, 2, requires_grad=True)
    head(embedding, torch.tensor([0, 1, 1]), 9).backward()
    assert embedding.grad is None and head.centres.grad is not None
    head(embedding, torch.tensor([0, 1, 1]), 10).backward()
    assert embedding.grad is not None and embedding.grad.abs().sum() > 0


def test_values_are_read_from_the_direction_alone():
    head, embedding = ValueHead(16), torch.randn(3, 16)
    assert torch.equal(
        head(embedding), torch.full((3, len(FACIAL)), 0.5)
    )  # the mean, until something is seen
    nn.init.normal_(head.read.weight)
    assert head(embedding).shape == (3, len(FACIAL))
    assert torch.allclose(head(embedding), head(7 * embedding), atol=1e-5)


def test_losses_are_repeatable_and_train_everything(task):
    first, again = (task.losses(StepRNG(0, 300)) for _ in range(2))
    assert set(first) == {"margin", "values"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    sum(first.values()).backward()
    assert all(
        p.grad is not None for module in task.modules().values() for p in module.parameters()
    )


def test_crops_are_damaged_faces_on_gray(task):
    crops = task.crops(np.arange(12), torch.Generator().manual_seed(0))
    assert crops.shape == (12, 3, 64, 64)
    assert crops.min() >= 0 and crops.max() <= 1
    gray = (crops == 0.5).all(1).float().mean((1, 2))
    assert (gray > 0.15).all() and (gray < 0.9).all()
    assert task.sheet().size == (12 * 64 // 2, 128)


def test_it_learns_who_is_who(task):
    parameters = [p for module in task.modules().values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3)
    totals = []
    for step in range(30):
        loss = sum(task.losses(StepRNG(0, step)).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert np.mean(totals[-5:]) < 0.7 * np.mean(totals[:3])


@pytest.fixture
def examination(small_world):
    crops = load_aligned_crops(small_world, np.arange(12))
    people, families = torch.from_numpy(small_world.people), torch.from_numpy(small_world.families)
    moved = torch.full((2, len(FACIAL), 2, 3, 64, 64), 100, dtype=torch.uint8)
    moved[:, 4, 1, 0] = (
        255  # the fifth value turns the crop red: cosine (255 + 200) / sqrt(3 (255² + 2 * 100²)) / ...
    )
    return RecognitionEvaluator(crops, people, families, moved)


def test_sensitivity_is_told_value_by_value(examination):
    cosines = examination.sensitivity(Colour())
    assert list(cosines) == list(FACIAL)
    expected = (255 + 100 + 100) / math.sqrt(3 * (255**2 + 2 * 100**2))
    assert cosines[FACIAL[4]] == pytest.approx(expected, abs=1e-4)
    assert all(
        value == pytest.approx(1.0, abs=1e-4)
        for name, value in cosines.items()
        if name != FACIAL[4]
    )
    assert examination.figures(Colour())["seen"] == float(expected <= 0.9)


def test_figures_and_report(examination):
    figures = examination.figures(Colour())
    assert set(figures) == {"auc", "auc_anyone", "same", "other", "seen", "moved"}
    assert 0 <= figures["auc"] <= 1
    text = format_report({"encoder": Colour(), "scorer": Colour()}, examination)
    assert text.startswith("| | encoder | judge |\n|---|---|---|\n| auc |")
    assert "| eye_tilt | 1.000 | 1.000 |" in text


def test_moved_pictures_are_kept(small_world, tmp_path, monkeypatch):
    from openpulid.mini.train import recognition as recognisers

    calls = []

    def made(people, device):
        calls.append(people)
        return torch.zeros(people, len(FACIAL), 2, 3, 64, 64, dtype=torch.uint8)

    monkeypatch.setattr(recognisers, "render_value_changes", made)
    for _ in range(2):
        examination = RecognitionEvaluator.make(small_world, tmp_path / "moved.npy", people=1)
    assert calls == [1]
    assert examination.crops.shape == (12, 3, 64, 64) and examination.moved.shape[0] == 1


def within_person(task):
    """Eigenvalues of the covariance of pictures of the same people, rising."""
    rows = np.arange(len(task.data))
    with torch.no_grad():
        embedding = task.recogniser.eval()(
            task.crops(rows, torch.Generator().manual_seed(1))
        ).double()
    _, place = task.people[rows].unique(return_inverse=True)
    apart = torch.cat(
        [embedding[place == k] - embedding[place == k].mean(0) for k in place.unique()]
    )
    return torch.linalg.eigvalsh(apart.T @ apart / (len(rows) - len(place.unique())))


def test_whitening_makes_noise_alike_in_all_directions(small_world):
    torch.manual_seed(0)
    task = RecognitionTask(
        VGGRecognition((8, 8, 16, 16), dim=3), small_world, None, families=2, pictures=6
    )
    before = within_person(task)
    whiten_embeddings(task, levelled=0.0)
    after = within_person(task)  # of other damage than it was made with
    assert before[-1] < 1e-6 and after[0] > 0.2 and after[-1] < 5


def test_levelling_brings_variances_nearer_to_each_other():
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()
    covariance = turn @ torch.diag(torch.tensor([1.0, 17.0]).double()) @ turn.T
    change = _matrix_power(covariance, -0.25, 1.0)  # 1 + 9 and 17 + 9, the mean being 9
    expected = turn @ torch.diag(torch.tensor([10.0**-0.25, 26.0**-0.25]).double()) @ turn.T
    assert torch.allclose(change, expected)
    assert torch.isfinite(
        _matrix_power(-covariance, -0.25, 1.0)
    ).all()  # what is left of noise may be negative


def test_a_folded_matrix_is_the_matrix_behind(task):
    crops, matrix = torch.rand(3, 3, 64, 64), torch.randn(16, 16).double()
    task.recogniser.eval()
    with torch.no_grad():
        task.recogniser.head[-1].running_mean.normal_()
        task.recogniser.head[-1].running_var.uniform_(0.5, 2.0)
        before = task.recogniser(crops)
        _fold_into_head(task.recogniser.head, matrix)
        assert torch.allclose(task.recogniser(crops), before @ matrix.T.float(), atol=1e-3)
