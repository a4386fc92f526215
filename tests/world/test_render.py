"""Renderings: deterministic, with exact masks and landmarks, and every facial value is visible."""

import pytest
import torch

from openpulid.world import FACIAL, PARTS, Person, Scene, render


@pytest.fixture(scope="module")
def neutral():
    return render([Person()], [Scene()])


def test_rendering_shapes_and_ranges(neutral):
    assert neutral.image.shape == (1, 3, 96, 96)
    assert neutral.image.min() >= 0 and neutral.image.max() <= 1
    assert neutral.parts.dtype == torch.uint8 and int(neutral.parts.max()) < len(PARTS)
    assert neutral.face.mean() == pytest.approx(0.36, abs=0.05)
    assert (neutral.person >= neutral.face).all()


def test_face_fills_two_thirds_of_width(neutral):
    columns = neutral.face[0, 0].amax(0).nonzero()
    assert (columns.max() - columns.min() + 1).item() / 96 == pytest.approx(0.65, abs=0.06)


def test_landmarks_are_on_facial_features(neutral):
    left, right, tip, corner_left, corner_right = neutral.landmarks[0]
    assert left[0] < tip[0] < right[0] and corner_left[0] < tip[0] < corner_right[0]
    assert left[1] < tip[1] < corner_left[1]
    for x, y in (left, right):  # a pupil is dark, the skin around it is not
        assert neutral.image[0, :, int(y), int(x)].mean() < 0.5
    rows, columns = neutral.landmarks[0, :, 1].long(), neutral.landmarks[0, :, 0].long()
    assert (neutral.parts[0, rows, columns] == PARTS.index("face")).all()


def test_rendering_is_deterministic_and_independent_of_batch():
    people = [Person.from_seed(seed) for seed in (1, 2)]
    scenes = [Scene(), Scene(pose="left", glasses="glasses")]
    batch = render(people, scenes, size=48)
    single = render(people[1:], scenes[1:], size=48)
    assert torch.equal(render(people, scenes, size=48).image, batch.image)
    torch.testing.assert_close(single.image[0], batch.image[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FACIAL)
def test_every_facial_value_changes_image(name):
    person = Person.from_seed(4).replace(nose_projection=0.5)
    pair = render(
        [person.replace(**{name: value}) for value in (0.2, 0.8)], [Scene(pose="left")] * 2
    )
    assert (pair.image[0] - pair.image[1]).abs().amax() > 0.06


def test_scene_attributes_are_visible():
    person = Person()
    names = ("noir", "pencil", "poster")
    plain, *styled = render([person] * 4, [Scene()] + [Scene(style=name) for name in names]).image
    for image in styled[:2]:
        assert (image.amax(0) - image.amin(0)).max() < 1e-5  # no color
    assert (plain.amax(0) - plain.amin(0)).max() > 0.3
    hat = render([person], [Scene(hat="beanie")])
    assert (hat.parts == PARTS.index("hat")).float().mean() > 0.05
    dark = render([person], [Scene(glasses="sunglasses")])
    assert (dark.parts == PARTS.index("eyewear")).float().mean() > 0.03


def test_number_of_people_and_scenes_must_match():
    with pytest.raises(ValueError, match="as many people as scenes"):
        render([Person()], [])
