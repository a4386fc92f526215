import math

import numpy as np
import pytest
import torch
from torch import nn

from openpulid.faces.miniature import VGGRecognition
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


class MeanColor(nn.Module):
    """An embedding that is the mean color of the crop, so that results are predictable."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, crops):
        return crops.mean((2, 3))


@pytest.fixture
def task(small_world):
    torch.manual_seed(0)
    return RecognitionTask(
        VGGRecognition((8, 8, 16, 16), dim=16), small_world, None, families=2, images_per_family=6
    )


def test_auc():
    assert compute_auc(torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.2])) == 1.0
    assert compute_auc(torch.tensor([0.5]), torch.tensor([0.5, 0.5])) == 0.5
    assert compute_auc(torch.tensor([0.3, 0.7]), torch.tensor([0.5])) == 0.5
    assert math.isnan(compute_auc(torch.tensor([]), torch.tensor([0.5])))


def test_family_table_repeats_images_of_smaller_families():
    table = build_family_table(np.array([7, 3, 7, 3, 7, 5]))
    assert table.tolist() == [[1, 3, 1], [5, 5, 5], [0, 2, 4]]


def test_margin_is_subtracted_from_cosine():
    head = MarginHead(2, 2, scale=10.0, margin=0.5, ramp=100)
    head.centers.data = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
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


def test_embedding_is_detached_during_ramp():
    head, embedding = MarginHead(2, 2, ramp=10), torch.randn(3, 2, requires_grad=True)
    head(embedding, torch.tensor([0, 1, 1]), 9).backward()
    assert embedding.grad is None and head.centers.grad is not None
    head(embedding, torch.tensor([0, 1, 1]), 10).backward()
    assert embedding.grad is not None and embedding.grad.abs().sum() > 0


def test_value_head_ignores_embedding_norm():
    head, embedding = ValueHead(16), torch.randn(3, 16)
    assert torch.equal(
        head(embedding), torch.full((3, len(FACIAL)), 0.5)
    )  # the mean before training
    nn.init.normal_(head.linear.weight)
    assert head(embedding).shape == (3, len(FACIAL))
    assert torch.allclose(head(embedding), head(7 * embedding), atol=1e-5)


def test_losses_are_deterministic_and_reach_all_parameters(task):
    first, second = (task.losses(StepRNG(0, 300)) for _ in range(2))
    assert set(first) == {"margin", "values"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    sum(first.values()).backward()
    assert all(
        p.grad is not None for module in task.modules().values() for p in module.parameters()
    )


def test_training_crops_have_gray_background(task):
    crops = task.sample_crops(np.arange(12), torch.Generator().manual_seed(0))
    assert crops.shape == (12, 3, 64, 64)
    assert crops.min() >= 0 and crops.max() <= 1
    gray = (crops == 0.5).all(1).float().mean((1, 2))
    assert (gray > 0.15).all() and (gray < 0.9).all()
    assert task.sheet().size == (12 * 64 // 2, 128)


def test_training_reduces_loss(task):
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
def evaluator(small_world):
    crops = load_aligned_crops(small_world, np.arange(12))
    people, families = torch.from_numpy(small_world.people), torch.from_numpy(small_world.families)
    changed_crops = torch.full((2, len(FACIAL), 2, 3, 64, 64), 100, dtype=torch.uint8)
    # The fifth value makes the crop redder: cosine (255 + 200) / sqrt(3 (255² + 2 * 100²)).
    changed_crops[:, 4, 1, 0] = 255
    return RecognitionEvaluator(crops, people, families, changed_crops)


def test_sensitivity_reports_each_value(evaluator):
    cosines = evaluator.sensitivity(MeanColor())
    assert list(cosines) == list(FACIAL)
    expected = (255 + 100 + 100) / math.sqrt(3 * (255**2 + 2 * 100**2))
    assert cosines[FACIAL[4]] == pytest.approx(expected, abs=1e-4)
    assert all(
        value == pytest.approx(1.0, abs=1e-4)
        for name, value in cosines.items()
        if name != FACIAL[4]
    )
    assert evaluator.evaluate(MeanColor())["seen"] == float(expected <= 0.9)


def test_evaluation_and_report(evaluator):
    metrics = evaluator.evaluate(MeanColor())
    assert set(metrics) == {"auc", "auc_anyone", "same", "other", "seen", "moved"}
    assert 0 <= metrics["auc"] <= 1
    text = format_report({"encoder": MeanColor(), "scorer": MeanColor()}, evaluator)
    assert text.startswith("| | encoder | scorer |\n|---|---|---|\n| auc |")
    assert "| eye_tilt | 1.000 | 1.000 |" in text


def test_evaluator_renders_changed_values_of_the_people_asked_for(small_world, monkeypatch):
    from openpulid.mini.train import recognition

    calls = []

    def render_blank(people, device):
        calls.append(people)
        return torch.zeros(people, len(FACIAL), 2, 3, 64, 64, dtype=torch.uint8)

    monkeypatch.setattr(recognition, "render_value_changes", render_blank)
    evaluator = RecognitionEvaluator.build(small_world, people=1)
    assert calls == [1]
    assert evaluator.crops.shape == (12, 3, 64, 64) and evaluator.changed_crops.shape[0] == 1


def within_person_eigenvalues(task):
    """Compute the ascending eigenvalues of the covariance within people."""
    rows = np.arange(len(task.data))
    with torch.no_grad():
        embedding = task.model.eval()(
            task.sample_crops(rows, torch.Generator().manual_seed(1))
        ).double()
    _, person_index = task.people[rows].unique(return_inverse=True)
    deviation = torch.cat(
        [
            embedding[person_index == k] - embedding[person_index == k].mean(0)
            for k in person_index.unique()
        ]
    )
    return torch.linalg.eigvalsh(deviation.T @ deviation / (len(rows) - len(person_index.unique())))


def test_whitening_equalizes_noise_in_all_directions(small_world):
    torch.manual_seed(0)
    task = RecognitionTask(
        VGGRecognition((8, 8, 16, 16), dim=3), small_world, None, families=2, images_per_family=6
    )
    original = within_person_eigenvalues(task)
    whiten_embeddings(task, equalization=0.0)
    whitened = within_person_eigenvalues(
        task
    )  # with other random degradation than it was fitted on
    assert original[-1] < 1e-6 and whitened[0] > 0.1 and whitened[-1] < 5


def test_equalization_brings_variances_closer():
    rotation = torch.tensor([[0.6, -0.8], [0.8, 0.6]]).double()
    covariance = rotation @ torch.diag(torch.tensor([1.0, 17.0]).double()) @ rotation.T
    change = _matrix_power(covariance, -0.25, 1.0)  # 1 + 9 and 17 + 9, the mean being 9
    expected = rotation @ torch.diag(torch.tensor([10.0**-0.25, 26.0**-0.25]).double()) @ rotation.T
    assert torch.allclose(change, expected)
    assert torch.isfinite(
        _matrix_power(-covariance, -0.25, 1.0)
    ).all()  # estimates may be negative because of noise


def test_folded_matrix_equals_matrix_after_head(task):
    crops, matrix = torch.rand(3, 3, 64, 64), torch.randn(16, 16).double()
    task.model.eval()
    with torch.no_grad():
        task.model.head[-1].running_mean.normal_()
        task.model.head[-1].running_var.uniform_(0.5, 2.0)
        original = task.model(crops)
        _fold_into_head(task.model.head, matrix)
        assert torch.allclose(task.model(crops), original @ matrix.T.float(), atol=1e-3)


def test_details_weigh_more_and_keep_their_color(small_world):
    """The iris hue counts three times as much as an eyebrow, and fewer crops are gray."""

    def build(details):
        torch.manual_seed(0)
        model = VGGRecognition((8, 8, 16, 16), dim=16)
        return RecognitionTask(
            model, small_world, None, families=2, images_per_family=6, details=details
        )

    plain, detailed = build(False), build(True)
    assert plain.feature_weights.unique().tolist() == [1.0]
    weights = dict(zip(FACIAL, detailed.feature_weights.tolist(), strict=True))
    assert weights["iris_hue"] == 3.0 and weights["brow_arch"] == 1.0

    rows = np.arange(64) % len(small_world)
    saturations = {}
    for name, task in {"plain": plain, "details": detailed}.items():
        crops = task.sample_crops(rows, torch.Generator().manual_seed(0))
        saturations[name] = (crops.amax(1) - crops.amin(1)).mean((1, 2))
    is_gray = {name: (values < 0.03).float().mean().item() for name, values in saturations.items()}
    assert is_gray["details"] < is_gray["plain"]
    assert saturations["details"].mean() > saturations["plain"].mean()

    losses = [task.losses(StepRNG(0, 0))["values"].item() for task in (plain, detailed)]
    assert losses[1] > losses[0]
