"""The evaluation with the shipped networks: scorers fit the metrics, batches change nothing."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from openpulid.bench.metrics import MetricInputs
from openpulid.errors import FaceError
from openpulid.io.image_grid import to_tensor
from openpulid.mini.evaluation import evaluate
from openpulid.mini.evaluation.prompts import sample_prompts
from openpulid.mini.evaluation.scorers import MiniScorers
from openpulid.pipelines.loading import load
from openpulid.pipelines.studio import Studio
from openpulid.world import ATTRIBUTES, HELD_OUT_PEOPLE
from openpulid.world.gallery import render_portrait


@pytest.fixture(scope="module")
def studio() -> Studio:
    return load("mini", device="cpu")


def test_batched_images_equal_single_images(studio: Studio) -> None:
    prompts = sample_prompts(people=3, prompts=1)
    identities = [studio.identify(render_portrait(HELD_OUT_PEOPLE + k)) for k in range(3)]
    batch = evaluate.generate_images(studio, [prompts], identities)
    for prompt, image in zip(prompts, batch, strict=True):
        single = studio.generate(prompt.prompt, identities[prompt.person], seed=prompt.seed).images
        assert (to_tensor(single)[0] - image).abs().mean() < 0.004  # quantization and rounding


def test_scorers_return_expected_shapes() -> None:
    scorers = MiniScorers.load()
    images = to_tensor([render_portrait(HELD_OUT_PEOPLE + k) for k in range(2)])
    faces = scorers.faces(images)
    assert faces.has_face.tolist() == [True, True] and faces.masks.shape == (2, 1, 96, 96)
    assert scorers.embed_images(images).shape == scorers.embed_texts(["portrait", "photo"]).shape
    read = scorers.read(images)
    assert {name: scores.shape[1] for name, scores in read.items()} == {
        n: len(c) for n, c in ATTRIBUTES.items()
    }


def test_images_without_face_are_scored() -> None:
    scorers = MiniScorers.load()
    people = [HELD_OUT_PEOPLE, HELD_OUT_PEOPLE + 1]
    gray = to_tensor([Image.new("RGB", (96, 96), "gray")] * 2)
    portraits = to_tensor([render_portrait(number) for number in people])
    no_faces, gallery = scorers.faces(gray), scorers.faces(portraits)
    assert not no_faces.has_face.any() and no_faces.embeddings.shape == gallery.embeddings.shape
    person = torch.tensor([0, 1])
    prompts = ["portrait", "photo"]
    requested = [scorers.attribute_classes({"pose": "front"})] * 2
    values = scorers.facial_values([str(number) for number in people])
    inputs = MetricInputs(
        gray,
        gray,
        no_faces,
        no_faces,
        person,
        portraits,
        gallery,
        prompts,
        requested,
        second_faces=gallery,
        facial_values=values,
    )
    scores = {metric.name: metric(inputs) for metric in scorers.metrics()}
    assert all(score.shape == (2,) for score in scores.values())
    assert (
        scores["face_sim"].tolist()
        == scores["rank1"].tolist()
        == scores["face_found"].tolist()
        == [0, 0]
    )
    assert scores["values"].isnan().all() and scores["copy_paste"].isnan().all()


def test_real_photo_is_rejected(studio: Studio) -> None:
    from skimage.data import astronaut

    with pytest.raises(FaceError, match="no face"):
        studio.identify(Image.fromarray(astronaut()))
