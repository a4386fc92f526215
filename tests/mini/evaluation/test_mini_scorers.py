"""The evaluation with the networks that are shipped: judges that fit the measures, batches that change nothing."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from openpulid.bench.metrics import MetricInputs
from openpulid.errors import FaceError
from openpulid.io.image_grid import to_tensor
from openpulid.mini.evaluation import evaluate
from openpulid.mini.evaluation.scorers import MiniScorers
from openpulid.pipelines.studio import Studio, load
from openpulid.world import ATTRIBUTES, HELD_OUT_PEOPLE
from openpulid.world.gallery import render_portrait


@pytest.fixture(scope="module")
def studio() -> Studio:
    return load("mini", device="cpu")


def test_batched_images_equal_single_images(studio: Studio) -> None:
    asked = evaluate.sample_prompts(people=3, prompts=1)
    identities = [studio.identify(render_portrait(HELD_OUT_PEOPLE + k)) for k in range(3)]
    together = evaluate.generate_images(studio, [asked], identities)
    for request, image in zip(asked, together, strict=True):
        alone = studio.generate(
            request.prompt, identities[request.person], seed=request.seed
        ).images
        assert (to_tensor(alone)[0] - image).abs().mean() < 0.004  # an eighth bit, and rounding


def test_scorers_return_expected_shapes() -> None:
    judges, images = (
        MiniScorers.load(),
        to_tensor([render_portrait(HELD_OUT_PEOPLE + k) for k in range(2)]),
    )
    faces = judges.faces(images)
    assert faces.found.tolist() == [True, True] and faces.masks.shape == (2, 1, 96, 96)
    assert judges.embed_images(images).shape == judges.embed_texts(["portrait", "photo"]).shape
    read = judges.read(images)
    assert {name: scores.shape[1] for name, scores in read.items()} == {
        n: len(c) for n, c in ATTRIBUTES.items()
    }


def test_images_without_face_are_scored() -> None:
    judges, people = MiniScorers.load(), [HELD_OUT_PEOPLE, HELD_OUT_PEOPLE + 1]
    gray = to_tensor([Image.new("RGB", (96, 96), "gray")] * 2)
    portraits = to_tensor([render_portrait(number) for number in people])
    nobody, gallery = judges.faces(gray), judges.faces(portraits)
    assert not nobody.found.any() and nobody.embeddings.shape == gallery.embeddings.shape
    who, prompts = torch.tensor([0, 1]), ["portrait", "photo"]
    wanted, truth = (
        [judges.wanted({"pose": "front"})] * 2,
        judges.truth([str(number) for number in people]),
    )
    it = MetricInputs(
        gray,
        gray,
        nobody,
        nobody,
        who,
        portraits,
        gallery,
        prompts,
        wanted,
        others=gallery,
        truth=truth,
    )
    told = {measure.name: measure(it) for measure in judges.measures()}
    assert all(values.shape == (2,) for values in told.values())
    assert (
        told["face_sim"].tolist() == told["rank1"].tolist() == told["face_found"].tolist() == [0, 0]
    )
    assert told["values"].isnan().all() and told["copy_paste"].isnan().all()


def test_real_photo_is_rejected(studio: Studio) -> None:
    from skimage.data import astronaut

    with pytest.raises(FaceError, match="no face"):
        studio.identify(Image.fromarray(astronaut()))
