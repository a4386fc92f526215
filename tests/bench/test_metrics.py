"""Tests of the metrics against numbers computed by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from openpulid.bench import metrics
from openpulid.bench.metrics import Faces, MetricInputs
from openpulid.bench.metrics.inputs import crop_squares


def build_faces(
    embeddings: list[list[float]], has_face: list[bool] | None = None, size: int = 2
) -> Faces:
    count = len(embeddings)
    return Faces(
        torch.tensor(has_face or [True] * count),
        torch.tensor(embeddings),
        torch.zeros(count, 1, size, size),
    )


def build_inputs(**changes: Any) -> MetricInputs:
    """Build inputs of two images of one person; the arguments replace fields."""
    count = len(changes.get("images", torch.zeros(2)))
    faces = build_faces([[1.0, 0.0]] * count)
    defaults: dict[str, Any] = {
        "images": torch.zeros(count, 3, 2, 2),
        "base_images": torch.zeros(count, 3, 2, 2),
        "faces": faces,
        "base_faces": faces,
        "subjects": torch.zeros(count, dtype=torch.long),
        "reference_images": torch.zeros(1, 3, 2, 2),
        "reference_faces": build_faces([[1.0, 0.0]]),
        "prompts": [""] * count,
    }
    return MetricInputs(**(defaults | changes))


def test_face_sim_is_a_cosine_and_zero_without_a_face() -> None:
    image_faces = build_faces(
        [[3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [1.0, 0.0]], [True, True, True, False]
    )
    references = build_faces([[1.0, 0.0], [0.0, -5.0], [7.0, 0.0]])
    inputs = build_inputs(
        images=torch.zeros(4, 3, 2, 2),
        faces=image_faces,
        reference_faces=references,
        subjects=torch.tensor([0, 1, 2, 0]),
    )
    assert metrics.FaceSim()(inputs).tolist() == pytest.approx([0.6, -1.0, 1.0, 0.0])
    assert metrics.FaceFound()(inputs).tolist() == [1, 1, 1, 0]


def test_rank1_uses_the_nearest_embedding_by_angle() -> None:
    references = build_faces([[1.0, 0.0], [0.0, 10.0], [-1.0, -1.0]])
    image_faces = build_faces(
        [[5.0, 4.0], [1.0, 2.0], [-3.0, -2.0], [1.0, 0.0]], [True, True, True, False]
    )
    inputs = build_inputs(
        images=torch.zeros(4, 3, 2, 2),
        faces=image_faces,
        reference_faces=references,
        subjects=torch.tensor([0, 0, 2, 0]),
    )
    assert metrics.Rank1()(inputs).tolist() == [1, 0, 1, 0]


def test_rank1_of_8_is_the_mean_over_random_galleries() -> None:
    generator = torch.Generator().manual_seed(0)
    references = build_faces(torch.randn(12, 6, generator=generator).tolist())
    noisy = references.embeddings + 0.8 * torch.randn(12, 6, generator=generator)
    has_face = [row != 5 for row in range(12)]
    inputs = build_inputs(
        images=torch.zeros(12, 3, 2, 2),
        faces=build_faces(noisy.tolist(), has_face),
        reference_faces=references,
        subjects=torch.arange(12),
    )
    a, b = (torch.nn.functional.normalize(x) for x in (noisy, references.embeddings))
    cosines = a @ b.T
    expected = []
    for row in range(12):
        others = [k for k in range(12) if k != row]
        galleries = list(itertools.combinations(others, 7))
        wins = sum(bool(cosines[row, row] > cosines[row, list(g)].max()) for g in galleries)
        expected.append(wins / len(galleries) * has_face[row])
    assert metrics.Rank1Of8()(inputs).tolist() == pytest.approx(expected)
    assert any(0 < value < 1 for value in expected)


def test_subject_whose_reference_shows_no_face_is_not_scored() -> None:
    """Its embedding is zero: no method could be near it."""
    references = build_faces([[1.0, 0.0], [0.0, 0.0], [0.6, 0.8]], [True, False, True])
    faces = build_faces([[1.0, 0.0], [0.0, 1.0], [-1.0, -0.1]])
    inputs = build_inputs(
        images=torch.zeros(3, 3, 2, 2),
        faces=faces,
        second_faces=faces,
        reference_faces=references,
        subjects=torch.tensor([0, 1, 2]),
    )
    for metric in (metrics.FaceSim(), metrics.Rank1(), metrics.Rank1Of8(), metrics.CopyPaste()):
        assert metric(inputs).isnan().tolist() == [False, True, False], metric.name
    # the third image is nearer to zero than to its own subject, which is no other subject
    assert metrics.Rank1()(inputs)[[0, 2]].tolist() == [1, 1]
    assert metrics.Rank1Of8()(inputs)[[0, 2]].tolist() == [1, 1]


def test_shuffled_identities_are_not_recognized() -> None:
    generator = torch.Generator().manual_seed(0)
    references = build_faces(torch.randn(64, 32, generator=generator).tolist())
    subjects = torch.arange(64)
    fields: dict[str, Any] = {
        "images": torch.zeros(64, 3, 2, 2),
        "reference_faces": references,
        "subjects": subjects,
    }
    own, other = (
        build_inputs(faces=references, **fields),
        build_inputs(faces=references.select(subjects.roll(1)), **fields),
    )
    assert metrics.Rank1()(own).mean() == 1 and metrics.FaceSim()(own).mean() == pytest.approx(1)
    assert metrics.Rank1()(other).mean() == 0 and metrics.FaceSim()(other).mean().abs() < 0.1


def test_facial_values_are_compared_with_true_parameters() -> None:
    facial_values = torch.tensor([[0.5, 0.1], [0.9, 0.4]])
    read_values = torch.tensor([[0.5, 0.3], [0.8, 0.4], [0.0, 0.0]])
    inputs = build_inputs(
        images=torch.arange(3)[:, None, None, None].expand(3, 3, 2, 2),
        faces=build_faces([[1.0]] * 3, [True, True, False]),
        subjects=torch.tensor([0, 1, 1]),
        facial_values=facial_values,
    )
    read = metrics.FacialValues(lambda images: read_values[images[:, 0, 0, 0]])
    values = read(inputs)
    assert values[:2].tolist() == pytest.approx([0.1, 0.05]) and values[2].isnan()
    assert read(build_inputs()).isnan().all()


def test_copy_paste_compares_distances_to_both_images() -> None:
    def at(*degrees: float) -> Faces:
        return build_faces(
            [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]
        )

    # the portrait at 0 degrees, the other picture at 40: images at 0, 20, 40 and without a face
    image_faces = Faces(
        torch.tensor([True, True, True, False]),
        at(0, 20, 40, 0).embeddings,
        torch.zeros(4, 1, 2, 2),
    )
    inputs = build_inputs(
        images=torch.zeros(4, 3, 2, 2),
        faces=image_faces,
        reference_faces=at(0),
        second_faces=at(40, 40, 40, 40),
    )
    got = metrics.CopyPaste()(inputs)
    assert got[:3].tolist() == pytest.approx([1.0, 0.0, -1.0], abs=1e-3) and got[3].isnan()
    assert metrics.CopyPaste()(build_inputs(faces=at(0, 0))).isnan().all()
    # Sim(GT): a copy of the reference image is no better than the second image allows
    similarity = [math.cos(math.radians(d)) for d in (40, 20, 0)]
    assert metrics.SimGT()(inputs).tolist() == pytest.approx([*similarity, 0], abs=1e-6)
    assert metrics.SimGT()(build_inputs(faces=at(0, 0))).isnan().all()


def test_faces_are_cropped_to_a_square_around_their_pixels() -> None:
    images = torch.zeros(2, 3, 8, 8)
    images[0, :, 2:6, 3:5] = 1
    masks = torch.zeros(2, 1, 8, 8)
    masks[0, 0, 2:6, 3:5] = 1
    crops = crop_squares(images, Faces(torch.tensor([True, False]), torch.zeros(2, 1), masks), 4)
    assert torch.equal(
        crops[0, 0], torch.tensor([[0.5, 1.0, 1.0, 0.5]] * 4)
    )  # four high, two wide, gray beside it
    assert torch.equal(crops[1], torch.zeros(3, 4, 4))


def test_fgis_compares_facial_regions_with_references() -> None:
    def colors(x: Tensor) -> Tensor:
        return x.mean((2, 3))

    red, green = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    red[0], green[1] = 1, 1
    whole = torch.ones(2, 1, 4, 4)
    image_faces = Faces(torch.tensor([True, True]), torch.zeros(2, 2), whole)
    inputs = build_inputs(
        images=torch.stack([red, green]), reference_images=red[None], faces=image_faces,
        reference_faces=Faces(torch.tensor([True]), torch.zeros(1, 2), whole[:1]),
    )  # fmt: skip
    assert metrics.FGIS(colors, size=4)(inputs).tolist() == pytest.approx([1.0, 0.0])


def test_face_diversity_is_mean_distance_to_other_faces_of_subject() -> None:
    def distance(a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3))

    images = torch.stack([torch.full((3, 2, 2), value) for value in (0.0, 0.25, 1.0, 0.5)])
    image_faces = Faces(torch.ones(4, dtype=torch.bool), torch.zeros(4, 2), torch.ones(4, 1, 2, 2))
    inputs = build_inputs(images=images, faces=image_faces, subjects=torch.tensor([0, 0, 0, 1]))
    got = metrics.FaceDiversity(distance, size=2)(inputs)
    assert got[:3].tolist() == pytest.approx([0.625, 0.5, 0.875]) and got[3].isnan()


def test_lpips_ignores_the_face() -> None:
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
    fields: dict[str, Any] = {"base_images": before, "faces": where, "base_faces": where}
    assert metrics.LpipsOutside(distance)(build_inputs(images=after, **fields)).item() == 0
    assert metrics.LpipsOutside(distance)(build_inputs(images=elsewhere, **fields)).item() > 1e-3


def test_clip_t_is_100_times_cosine() -> None:
    texts = {"a": [1.0, 0.0], "b": [0.0, 1.0]}
    measure = metrics.ClipT(
        lambda x: torch.tensor([[3.0, 4.0], [3.0, 4.0]]),
        lambda prompts: torch.tensor([texts[prompt] for prompt in prompts]),
    )
    assert measure(build_inputs(prompts=["a", "b"])).tolist() == pytest.approx([60.0, 80.0])


def test_clip_i_and_dino_compare_with_base_images() -> None:
    def embed(x: Tensor) -> Tensor:
        return x.flatten(1)[:, :2]

    after = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).view(2, 1, 1, 2)
    before = torch.tensor([[2.0, 0.0], [1.0, 0.0]]).view(2, 1, 1, 2)
    inputs = build_inputs(images=after, base_images=before)
    for measure in (metrics.ClipI(embed), metrics.Dino(embed)):
        assert measure(inputs).tolist() == pytest.approx([1.0, math.sqrt(0.5)])
    assert (metrics.ClipI.name, metrics.Dino.name) == ("clip_i", "dino")


def test_metrics_share_the_features_of_a_network() -> None:
    pytest.importorskip("torchmetrics")
    calls: list[float] = []

    def embed(x: Tensor) -> Tensor:
        calls.append(x.mean().item())
        return x.flatten(1)[:, :2]

    inputs = build_inputs(images=torch.ones(2, 3, 2, 2))
    metrics.ClipT(embed, lambda prompts: torch.ones(2, 2))(inputs)
    metrics.ClipI(embed)(inputs)
    metrics.FID(embed).update(inputs)
    assert sorted(calls) == [0.0, 1.0]  # the images, and those of the base


def test_outside_face_excludes_both_faces() -> None:
    before = torch.zeros(1, 3, 2, 2)
    after = torch.zeros(1, 3, 2, 2)
    after[0, :, 0, 0] = 1.0  # in the face of the first image
    after[0, :, 0, 1] = 1.0  # in the face of the second
    after[0, 0, 1, 0] = 0.9  # outside: one of three channels by 0.9, so 0.3
    one, two = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    one[0, 0, 0, 0] = two[0, 0, 0, 1] = 1
    image_faces, base_faces = (
        Faces(torch.tensor([True]), torch.zeros(1, 1), mask) for mask in (one, two)
    )
    inputs = build_inputs(
        images=after, base_images=before, faces=image_faces, base_faces=base_faces
    )
    assert metrics.OutsideFace()(inputs).tolist() == pytest.approx([0.3 / 2])


def test_outside_face_is_zero_for_an_image_that_is_all_face() -> None:
    all_face = Faces(torch.tensor([True]), torch.zeros(1, 1), torch.ones(1, 1, 2, 2))
    inputs = build_inputs(
        images=torch.ones(1, 3, 2, 2),
        base_images=torch.zeros(1, 3, 2, 2),
        faces=all_face,
        base_faces=all_face,
    )
    assert metrics.OutsideFace()(inputs).tolist() == [0]


def test_attributes_counts_only_requested_ones() -> None:
    scores = {
        "hat": torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.0, 1.0]]),
        "pose": torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]),
    }
    inputs = build_inputs(
        images=torch.zeros(3, 3, 4, 4), requested=[{"hat": 1, "pose": 2}, {"pose": 2}, {}]
    )
    got = metrics.Attributes(lambda images: scores)(inputs)
    assert got[:2].tolist() == [0.5, 1.0]
    assert got[2].isnan()
    assert metrics.Attributes(lambda images: scores).check(inputs) == [
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
        for part in before.split(120):  # whatever is values at once
            measure.update(build_inputs(images=part + shift, base_images=part))
        assert measure.compute() == pytest.approx(distance, rel=1e-3, abs=1e-6)


def test_bootstrap_weights_subjects_not_images() -> None:
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


def test_bootstrap_of_one_subject_has_no_interval() -> None:
    got = metrics.bootstrap(torch.tensor([0.25, 0.75, float("nan")]), torch.tensor([3, 3, 4]))
    assert got.mean == 0.5 and math.isnan(got.low) and math.isnan(got.high)


def test_bootstrap_without_values_is_nan() -> None:
    assert math.isnan(metrics.bootstrap(torch.tensor([float("nan")]), torch.tensor([0])).mean)
