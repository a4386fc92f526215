"""The numbers behind a scene: expected values of two scenes and of their renderings."""

import pytest
import torch

from openpulid.world import ATTRIBUTES, Person, Scene, render
from openpulid.world.scene_tensors import SceneTensors

SCENES = [
    Scene(
        pose="left",
        expression="laugh",
        light="neon",
        background="teal",
        pattern="dots",
        clothing="red",
        glasses="glasses",
        hat="beanie",
        hat_color="green",
        hair_color="blond",
        hair_length="bob",
        beard="beard",
        jitter=tuple(k / 16 for k in range(1, 13)),
    ),
    Scene(
        pose="down",
        expression="wink",
        light="moon",
        background="pink",
        pattern="stripes",
        clothing="black",
        glasses="sunglasses",
        hair_color="gray",
        hair_length="long",
        beard="moustache",
        style="poster",
        jitter=tuple(-k / 16 for k in range(1, 13)),
    ),
]


@pytest.fixture(scope="module")
def stage() -> SceneTensors:
    return SceneTensors.from_scenes(SCENES, torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("yaw", [-0.45375, -0.00625]),
        ("pitch", [0.0075, 0.2725]),
        ("roll", [0.013125, -0.013125]),
        ("zoom", [1.1525, 1.1275]),
        ("shift_x", [0.015625, -0.015625]),
        ("shift_y", [0.088125, 0.061875]),
        ("wink", [0.0, 1.0]),
        ("skin_shift", [0.02625, -0.02625]),
        ("blush", [0.75, 0.25]),
        ("volume", [0.6875, -0.6875]),
        ("hairline", [0.75, -0.75]),
        ("parting", [0.625, -0.625]),
        ("ambient", [[0.4989, 0.4365375, 0.58205], [0.345825, 0.422675, 0.5955875]]),
        ("ambience", [[0.86, 0.76, 0.96], [0.66, 0.74, 0.94]]),
        ("background", [[0.1, 0.6, 0.62], [0.96, 0.56, 0.72]]),
        ("clothing", [[0.8, 0.13, 0.13], [0.12, 0.12, 0.14]]),
        ("hat_color", [[0.16, 0.58, 0.27], [0.8, 0.13, 0.13]]),
        ("hair", [[0.91375, 0.7225, 0.36125], [0.675, 0.675, 0.69375]]),
    ],
)
def test_scenes_have_these_values(stage: SceneTensors, name: str, expected: list) -> None:
    values = getattr(stage, name)
    assert values.shape[2:] == ((1, 1) if values.ndim == 4 else (1,))
    torch.testing.assert_close(values.flatten(1).squeeze(1), torch.tensor(expected))


def test_rotation_applies_yaw_then_pitch_then_roll(stage: SceneTensors) -> None:
    expected = torch.tensor(
        [
            [0.8987754, -0.0131243, -0.4382129],
            [0.0085093, 0.9998857, -0.0124935],
            [0.4383268, 0.0074999, 0.8987844],
        ]
    )
    torch.testing.assert_close(stage.rotation[0], expected, atol=1e-6, rtol=0)


def test_expressions_are_numbers_by_name(stage: SceneTensors) -> None:
    values = {name: value.flatten().tolist() for name, value in stage.expression.items()}
    assert values == {
        "smile": pytest.approx([0.9, 0.6]),
        "open": pytest.approx([0.105, 0.0]),
        "teeth": pytest.approx([0.045, 0.0]),
        "mouth_width": pytest.approx([1.15, 1.05]),
        "eyes": pytest.approx([0.72, 1.0]),
        "brow_raise": pytest.approx([0.015, 0.0]),
        "brow_angle": pytest.approx([0.0, 0.0]),
        "mouth_tilt": pytest.approx([0.0, 0.13]),
    }


def test_single_lamp_is_joined_by_a_dark_one(stage: SceneTensors) -> None:
    (first, first_color), (second, second_color) = stage.lamps
    left, right = [-0.848770, 0.0998553, 0.519248], [0.848770, 0.0998553, 0.519248]
    torch.testing.assert_close(first, torch.tensor([left, [-0.400782, 0.601173, 0.691349]]))
    torch.testing.assert_close(second, torch.tensor([right, [0.0, 0.0, 1.0]]))
    colors = torch.tensor([[0.72, 0.12, 0.55], [0.34, 0.44, 0.66]])
    torch.testing.assert_close(first_color.flatten(1), colors)
    colors = torch.tensor([[0.05, 0.62, 0.66], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(second_color.flatten(1), colors)


@pytest.mark.parametrize(
    ("field", "attribute"),
    [
        ("pattern", "pattern"),
        ("glasses", "glasses"),
        ("hat", "hat"),
        ("length", "hair_length"),
        ("beard", "beard"),
        ("style", "style"),
    ],
)
def test_only_the_class_of_the_scene_is_one(
    stage: SceneTensors, field: str, attribute: str
) -> None:
    classes = getattr(stage, field)
    assert tuple(classes) == ATTRIBUTES[attribute]
    for k, scene in enumerate(SCENES):
        present = {name for name, value in classes.items() if value[k].item() == 1}
        assert present == {getattr(scene, attribute)}
        assert sum(value[k].item() for value in classes.values()) == 1


def test_renderings_have_these_colors_and_landmarks() -> None:
    rendering = render([Person(), Person.from_seed(1)], SCENES, size=48)
    means = torch.tensor([[0.352954, 0.407790, 0.426128], [0.307592, 0.245293, 0.404204]])
    torch.testing.assert_close(rendering.image.mean((2, 3)), means, atol=1e-4, rtol=0)
    landmarks = torch.tensor(
        [
            [12.737589, 21.828863],
            [24.421848, 21.718239],
            [15.370563, 28.228497],
            [13.913232, 33.575696],
            [24.035219, 33.479862],
        ]
    )
    torch.testing.assert_close(rendering.landmarks[0], landmarks, atol=1e-3, rtol=0)
