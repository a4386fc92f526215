"""Every measure against numbers computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openpulid.bench import metrics
from openpulid.bench.metrics import Faces, MetricInputs
from openpulid.bench.metrics.inputs import face_crops


def faces(embeddings: list[list[float]], found: list[bool] | None = None, size: int = 2) -> Faces:
    count = len(embeddings)
    return Faces(
        torch.tensor(found or [True] * count),
        torch.tensor(embeddings),
        torch.zeros(count, 1, size, size),
    )


def evidence(**known: Any) -> MetricInputs:
    """Two images of one person, unless said otherwise."""
    count = len(known.get("images", torch.zeros(2)))
    blank = {"images": torch.zeros(count, 3, 2, 2), "before": torch.zeros(count, 3, 2, 2)}
    nobody = faces([[1.0, 0.0]] * count)
    blank |= {"seen": nobody, "was": nobody, "person": torch.zeros(count, dtype=torch.long)}  # type: ignore[dict-item]
    blank |= {"portraits": torch.zeros(1, 3, 2, 2), "gallery": faces([[1.0, 0.0]])}  # type: ignore[dict-item]
    return MetricInputs(**(blank | {"prompts": [""] * count} | known))


def test_face_sim_is_a_cosine_and_zero_without_a_face() -> None:
    seen = faces([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [1.0, 0.0]], [True, True, True, False])
    gallery = faces([[1.0, 0.0], [0.0, -5.0], [7.0, 0.0]])
    it = evidence(
        images=torch.zeros(4, 3, 2, 2),
        seen=seen,
        gallery=gallery,
        person=torch.tensor([0, 1, 2, 0]),
    )
    assert metrics.FaceSim()(it).tolist() == pytest.approx([0.6, -1.0, 1.0, 0.0])
    assert metrics.FaceFound()(it).tolist() == [1, 1, 1, 0]


def test_rank1_takes_the_nearest_by_angle() -> None:
    gallery = faces([[1.0, 0.0], [0.0, 10.0], [-1.0, -1.0]])
    seen = faces([[5.0, 4.0], [1.0, 2.0], [-3.0, -2.0], [1.0, 0.0]], [True, True, True, False])
    it = evidence(
        images=torch.zeros(4, 3, 2, 2),
        seen=seen,
        gallery=gallery,
        person=torch.tensor([0, 0, 2, 0]),
    )
    assert metrics.Rank1()(it).tolist() == [1, 0, 1, 0]


def test_shuffled_people_are_nobody() -> None:
    generator = torch.Generator().manual_seed(0)
    gallery = faces(torch.randn(64, 32, generator=generator).tolist())
    person = torch.arange(64)
    known: dict[str, Any] = {
        "images": torch.zeros(64, 3, 2, 2),
        "gallery": gallery,
        "person": person,
    }
    own, other = (
        evidence(seen=gallery, **known),
        evidence(seen=gallery.rows(person.roll(1)), **known),
    )
    assert metrics.Rank1()(own).mean() == 1 and metrics.FaceSim()(own).mean() == pytest.approx(1)
    assert metrics.Rank1()(other).mean() == 0 and metrics.FaceSim()(other).mean().abs() < 0.1


def test_facial_values_are_compared_with_the_truth() -> None:
    truth = torch.tensor([[0.5, 0.1], [0.9, 0.4]])
    seen = faces([[0.5, 0.3], [0.8, 0.4], [0.0, 0.0]], [True, True, False])
    it = evidence(
        images=torch.zeros(3, 3, 2, 2), seen=seen, person=torch.tensor([0, 1, 1]), truth=truth
    )
    told = metrics.FacialValues(lambda embeddings: embeddings)(it)
    assert told[:2].tolist() == pytest.approx([0.1, 0.05]) and told[2].isnan()
    assert metrics.FacialValues(lambda embeddings: embeddings)(evidence()).isnan().all()


def test_copy_paste_asks_which_picture_is_nearer() -> None:
    def at(*degrees: float) -> Faces:
        return faces([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])

    # the portrait at 0 degrees, the other picture at 40: images at 0, 20, 40 and without a face
    seen = Faces(
        torch.tensor([True, True, True, False]),
        at(0, 20, 40, 0).embeddings,
        torch.zeros(4, 1, 2, 2),
    )
    it = evidence(
        images=torch.zeros(4, 3, 2, 2), seen=seen, gallery=at(0), others=at(40, 40, 40, 40)
    )
    got = metrics.CopyPaste()(it)
    assert got[:3].tolist() == pytest.approx([1.0, 0.0, -1.0], abs=1e-3) and got[3].isnan()
    assert metrics.CopyPaste()(evidence(seen=at(0, 0))).isnan().all()


def test_faces_are_cropped_to_a_square_around_their_pixels() -> None:
    images = torch.zeros(2, 3, 8, 8)
    images[0, :, 2:6, 3:5] = 1
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, 0, 2:6, 3:5] = 1
    crops = face_crops(images, Faces(torch.tensor([True, False]), torch.zeros(2, 1), masks), 4)
    assert torch.equal(
        crops[0, 0], torch.tensor([[0.5, 1.0, 1.0, 0.5]] * 4)
    )  # four high, two wide, gray beside it
    assert torch.equal(crops[1], torch.zeros(3, 4, 4))


def test_fgis_compares_faces_with_portraits() -> None:
    def colors(x: Tensor) -> Tensor:
        return x.mean((2, 3))

    red, green = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    red[0], green[1] = 1, 1
    whole = torch.ones(2, 1, 4, 4)
    seen = Faces(torch.tensor([True, True]), torch.zeros(2, 2), whole)
    it = evidence(
        images=torch.stack([red, green]), portraits=red[None], seen=seen,
        gallery=Faces(torch.tensor([True]), torch.zeros(1, 2), whole[:1]),
    )  # fmt: skip
    assert metrics.FGIS(colors, size=4)(it).tolist() == pytest.approx([1.0, 0.0])


def test_face_diversity_is_the_distance_to_the_other_faces_of_the_person() -> None:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3))

    images = torch.stack([torch.full((3, 2, 2), value) for value in (0.0, 0.25, 1.0, 0.5)])
    seen = Faces(torch.ones(4, dtype=torch.bool), torch.zeros(4, 2), torch.ones(4, 1, 2, 2))
    it = evidence(images=images, seen=seen, person=torch.tensor([0, 0, 0, 1]))
    got = metrics.FaceDiversity(distance, size=2)(it)
    assert got[:3].tolist() == pytest.approx([0.625, 0.5, 0.875]) and got[3].isnan()


def test_lpips_sees_nothing_of_the_face() -> None:
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    network = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()

    def distance(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            return network(a, b, normalize=True).flatten()

    before = torch.rand(1, 3, 64, 64)
    after, elsewhere = before.clone(), before.clone()
    after[:, :, 16:48, 16:48] = 1
    elsewhere[:, :, :16] = 1
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, 16:48, 16:48] = 1
    where = Faces(torch.ones(1, dtype=torch.bool), torch.zeros(1, 2), mask)
    known: dict[str, Any] = {"before": before, "seen": where, "was": where}
    assert metrics.LpipsOutside(distance)(evidence(images=after, **known)).item() == 0
    assert metrics.LpipsOutside(distance)(evidence(images=elsewhere, **known)).item() > 1e-3


def test_clip_t_is_a_hundred_cosines() -> None:
    texts = {"a": [1.0, 0.0], "b": [0.0, 1.0]}
    measure = metrics.ClipT(
        lambda x: torch.tensor([[3.0, 4.0], [3.0, 4.0]]),
        lambda prompts: torch.tensor([texts[prompt] for prompt in prompts]),
    )
    assert measure(evidence(prompts=["a", "b"])).tolist() == pytest.approx([60.0, 80.0])


def test_clip_i_compares_with_and_without() -> None:
    def embed(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2]

    after = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    before = torch.tensor([[2.0, 0.0], [1.0, 0.0]]).view(2, 1, 1, 2)
    it = evidence(images=after, before=before)
    for measure in (metrics.ClipI(embed), metrics.Dino(embed)):
        assert measure(it).tolist() == pytest.approx([1.0, math.sqrt(0.5)])
    assert (metrics.ClipI.name, metrics.Dino.name) == ("clip_i", "dino")


def test_outside_face_leaves_out_both_faces() -> None:
    before = torch.zeros(1, 3, 2, 2)
    after = torch.zeros(1, 3, 2, 2)
    after[0, :, 0, 0] = 1.0  # in the face of the first image
    after[0, :, 0, 1] = 1.0  # in the face of the second
    after[0, 0, 1, 0] = 0.9  # outside: one of three channels by 0.9, so 0.3
    one, two = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    one[0, 0, 0, 0] = two[0, 0, 0, 1] = 1
    seen, was = (Faces(torch.tensor([True]), torch.zeros(1, 1), mask) for mask in (one, two))
    it = evidence(images=after, before=before, seen=seen, was=was)
    assert metrics.OutsideFace()(it).tolist() == pytest.approx([0.3 / 2])


def test_outside_face_of_an_image_that_is_all_face_is_zero() -> None:
    all_face = Faces(torch.tensor([True]), torch.zeros(1, 1), torch.ones(1, 1, 2, 2))
    it = evidence(
        images=torch.ones(1, 3, 2, 2), before=torch.zeros(1, 3, 2, 2), seen=all_face, was=all_face
    )
    assert metrics.OutsideFace()(it).tolist() == [0]


def test_attributes_counts_only_what_is_asked() -> None:
    scores = {
        "hat": torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.0, 1.0]]),
        "pose": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
    }
    it = evidence(images=torch.zeros(3, 3, 4, 4), wanted=[{"hat": 1, "pose": 2}, {"pose": 2}, {}])
    got = metrics.Attributes(lambda images: scores)(it)
    assert got[:2].tolist() == [0.5, 1.0]
    assert got[2].isnan()
    assert metrics.Attributes(lambda images: scores).each(it) == [
        {"hat": True, "pose": False},
        {"pose": True},
        {},
    ]


def test_fid_is_the_distance_of_two_gaussians() -> None:
    pytest.importorskip("torchmetrics")
    before = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 0.5
    for shift, distance in (
        (0.0, 0.0),
        (0.25, 3 * 0.25**2),
    ):  # equal covariances: the squared distance of the means
        measure = metrics.FID(lambda images: images.mean((2, 3)))
        assert math.isnan(measure.compute())
        for part in before.split(120):  # whatever is told at once
            measure.update(evidence(images=part + shift, before=part))
        assert measure.compute() == pytest.approx(distance, rel=1e-3, abs=1e-6)


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


def test_of_one_person_nothing_is_sure() -> None:
    got = metrics.bootstrap(torch.tensor([0.25, 0.75, float("nan")]), torch.tensor([3, 3, 4]))
    assert got.mean == 0.5 and math.isnan(got.low) and math.isnan(got.high)


def test_bootstrap_of_nothing_is_nan() -> None:
    assert math.isnan(metrics.bootstrap(torch.tensor([float("nan")]), torch.tensor([0])).mean)
