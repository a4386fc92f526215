"""The reader of facial parameters: its images, its targets, and what it sees."""

from __future__ import annotations

import torch

from openpulid.faces.miniature import MiniFaceDetector
from openpulid.io.checkpoints import load_module
from openpulid.mini.evaluation.value_reader import ValueReader, ValueScorer, get_facial_values
from openpulid.mini.train.recognition import FACIAL_COLUMNS
from openpulid.pipelines.presets import MINIATURE
from openpulid.world import FACIAL, HELD_OUT_PEOPLE, Person, Scene, render


def load_scorer() -> ValueScorer:
    detector = load_module(MiniFaceDetector, MINIATURE / "detector.safetensors")
    return ValueScorer(detector, load_module(ValueReader, MINIATURE / "value-reader.safetensors"))


def test_reader_sees_the_color_of_the_eyes() -> None:
    """Every other parameter stays the same, so the prediction of the iris hue alone moves."""
    people = [Person.from_seed(HELD_OUT_PEOPLE + seed) for seed in range(8)]
    values = []
    for hue in (0.1, 0.9):
        changed = [person.replace(iris_hue=hue) for person in people]
        values.append(load_scorer()(render(changed, [Scene()] * 8).image))
    moved = (values[1] - values[0]).mean(0)
    assert moved[FACIAL.index("iris_hue")] > 0.4
    others = [index for index, name in enumerate(FACIAL) if not name.startswith("iris")]
    assert moved[others].abs().max() < 0.15


def test_reader_is_better_than_the_mean_person() -> None:
    names = [str(HELD_OUT_PEOPLE + seed) for seed in range(32)]
    truth = get_facial_values(names)
    people = [Person.from_seed(int(name)) for name in names]
    predicted = load_scorer()(render(people, [Scene()] * len(people)).image)
    error = (predicted - truth).abs().mean()
    assert error < 0.75 * (truth.mean(0) - truth).abs().mean()


def test_images_without_a_face_have_no_values() -> None:
    values = load_scorer()(torch.full((2, 3, 96, 96), 0.5))
    assert values.shape == (2, len(FACIAL)) and not values.any()


def test_facial_values_are_those_of_subjects() -> None:
    parameters = get_facial_values(["1000003", "1000004"])
    assert parameters.shape == (2, len(FACIAL_COLUMNS))
    assert torch.equal(
        parameters[1], torch.tensor(Person.from_seed(1000004).vector())[FACIAL_COLUMNS]
    )
