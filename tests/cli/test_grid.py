"""`pulid generate --grid` and `--name`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import ControlNetModel
from PIL import Image

from openpulid.errors import OptionError
from openpulid.pipelines.controls import ControlInput
from openpulid.pipelines.file_names import check_pattern, image_name
from openpulid.pipelines.grid import Axis, Grid
from openpulid.pipelines.inputs import RequestInputs
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Person
from openpulid.pipelines.style_image import StyleInput
from tests.cli.conftest import FakeStudio, Run


def test_values_with_commas_are_separated_by_bars() -> None:
    assert Axis.parse("scale=0.4, 0.7") == Axis("scale", ("0.4", "0.7"))
    assert Axis.parse("--num-zero=8") == Axis("num-zero", ("8",))
    assert Axis.parse("prompt=a, b | c").values == ("a, b", "c")
    for text in ("scale", "scale=", "=1", "scale=1,,2", "scale=,"):
        with pytest.raises(OptionError, match="expected OPTION=VALUE,VALUE"):
            Axis.parse(text)


def test_first_axis_gives_the_columns() -> None:
    grid = Grid((Axis("scale", ("1", "2")), Axis("seed", ("5", "6")), Axis("steps", ("3",))))
    assert grid.cells() == [
        {"seed": seed, "steps": "3", "scale": scale} for seed in ("5", "6") for scale in ("1", "2")
    ]
    with pytest.raises(OptionError, match="scale is on two axes"):
        Grid((Axis("scale", ("1",)), Axis("scale", ("2",))))
    with pytest.raises(OptionError, match="has 500 cells; use at most 400"):
        Grid((Axis("seed", tuple(map(str, range(500)))),))


def test_grid_writes_the_images_and_one_sheet(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    options = ("--id", anna, "--face", 0, "--num", 2, "--seed", "random", "-o", tmp_path / "o")
    axes = ("--grid", "scale=0.4,0.7,1.0", "--grid", "method=pulid,instantid")
    done = pulid("generate", "portrait", *options, *axes)
    assert done.code == 0, done.err
    paths = [Path(line) for line in done.out.splitlines()]
    assert len(paths) == 13 and all(path.is_file() for path in paths)
    stored = [Provenance.read(path).request for path in paths[:-1]]
    first = stored[0].seed
    assert [request.seed - first for request in stored] == [0, 1] * 6
    assert [request.identity.scale for request in stored[::2]] == [0.4, 0.7, 1.0] * 2
    methods = [request.model.method for request in stored[::2] if request.model]
    assert methods == [None] * 3 + ["instantid"] * 3
    assert paths[-1].name == f"grid-portrait-{first}.png"
    sheet = Image.open(paths[-1])
    assert sheet.width == 48 + 3 * 400 - 16 and sheet.height == 48 + 120 + 4 * 440


def test_cells_share_a_controlnet(
    pulid: Run,
    studio: FakeStudio,
    anna: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each copy would stay in memory until the grid is complete."""
    ControlNetModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        conditioning_embedding_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
    ).save_pretrained(tmp_path / "net")
    used: list[ControlInput] = []
    generate = studio.generate

    def record(request: GenerationRequest, inputs: RequestInputs, **options: Any) -> Any:
        used.extend(inputs.controls)
        return generate(request, inputs, **options)

    monkeypatch.setattr(studio, "generate", record)
    control = ("--control", tmp_path / "net", "--control-image", anna)
    grid = ("--grid", "control-scale=0.2,0.5,1", "-o", tmp_path / "out")
    done = pulid("generate", "portrait", *control, *grid)
    assert done.code == 0, done.err
    assert [control.options["scale"] for control in used] == [0.2, 0.5, 1]
    assert used[0].files is used[1].files is used[2].files


def test_cells_share_the_adapter_of_a_style(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[StyleInput] = []
    generate = studio.generate

    def record(request: GenerationRequest, inputs: RequestInputs, **options: Any) -> Any:
        assert isinstance(inputs.add_ons.style, StyleInput)
        used.append(inputs.add_ons.style)
        return generate(request, inputs, **options)

    monkeypatch.setattr(studio, "generate", record)
    grid = ("--grid", "style-scale=0.2,0.5,1", "-o", tmp_path / "out")
    done = pulid("generate", "portrait", "--style", anna, *grid)
    assert done.code == 0, done.err
    assert [style.scale for style in used] == [0.2, 0.5, 1]
    assert used[0].file is used[1].file is used[2].file


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("scal=1", "--grid has no option 'scal' (did you mean 'scale'?)"),
        ("out=a", "--grid has no option 'out'"),
        ("scale=9", "--scale must be at most 5, got 9.0"),
        ("seed=-5", "--seed must be at least 0"),
        ("method=pulid,foo", "there is no method 'foo'"),
        ("prompt=portrait|zebra", "does not know 'zebra'"),
        ("size=96x96,7x7", "must be multiples of 8"),
    ],
)
def test_a_wrong_value_is_reported_before_any_image(
    pulid: Run, studio: FakeStudio, tmp_path: Path, axis: str, message: str
) -> None:
    refused = pulid("generate", "portrait", "--grid", axis, "-o", tmp_path)
    assert refused.is_one_sentence and message in refused.err
    assert studio.requests == [] and list(tmp_path.iterdir()) == []


def test_names_follow_a_pattern(pulid: Run, studio: FakeStudio, tmp_path: Path) -> None:
    pattern = "{preset}-{method}-{seed:04}-{steps}"
    done = pulid("generate", "a portrait", "--num", 2, "--name", pattern, "-o", tmp_path)
    assert done.code == 0, done.err
    names = [Path(line).name for line in done.out.splitlines()]
    assert names == ["mini-pulid-0000-20.png", "mini-pulid-0001-20.png"]
    # a size that the preset leaves open
    done = pulid("generate", "a portrait", "--name", "{width:04}", "-o", tmp_path)
    assert done.code == 0 and Path(done.out.strip()).name == "0032.png", done.err
    for wrong, message in (
        ("{promt}", "unknown field 'promt' (did you mean 'prompt'?)"),
        ("a/{seed}", "contains a folder"),
        ("{seed", "is no pattern"),
        ("{seed.real}", "unknown field"),
        ("{seed:{foo}}", "has a field inside a field"),
    ):
        refused = pulid("generate", "portrait", "--name", wrong, "-o", tmp_path)
        assert refused.is_one_sentence and message in refused.err


@pytest.mark.parametrize("pattern", ["{prompt:.2f}", "{method:d}", "{scale:s}"])
def test_a_name_that_cannot_be_formatted_is_reported_before_any_image(
    pulid: Run, studio: FakeStudio, tmp_path: Path, pattern: str
) -> None:
    refused = pulid("generate", "portrait", "--name", pattern, "-o", tmp_path)
    assert refused.is_one_sentence and "cannot be formatted" in refused.err
    assert studio.requests == [] and list(tmp_path.iterdir()) == []


def test_a_name_is_valid_on_every_system() -> None:
    request = GenerationRequest(prompt="what? a <portrait>: " + "ä" * 60, seed=2**64 - 1)
    assert image_name(request, "x:{seed}") == "x-18446744073709551615.png"
    assert image_name(request, " .{scale}. ") == "0.png"
    assert image_name(request, "{scale:.2f}") == "0.00.png"
    shown = request.model_copy(update={"people": (Person(images=["a.png"], scale=0.1 + 0.2),)})
    assert image_name(shown, "{scale}") == "0.3.png"
    assert len(image_name(request, "{prompt}" * 9).encode()) <= 204
    assert image_name(request, "...") == "image-18446744073709551615.png"
    with pytest.raises(OptionError, match="cannot be formatted"):
        image_name(request, "{seed:q}")
    check_pattern("{{literal}}-{seed}")


def test_random_seed_is_in_the_name(pulid: Run, studio: FakeStudio, tmp_path: Path) -> None:
    done = [pulid("generate", "portrait", "--seed", "random", "-o", tmp_path) for _ in range(2)]
    seeds = {request.seed for request in studio.requests}
    assert len(seeds) == 2
    assert {Path(run.out.strip()).name for run in done} == {f"portrait-{s}.png" for s in seeds}
    largest = pulid("generate", "portrait", "--seed", 2**64 - 1, "-o", tmp_path)
    assert largest.out.strip().endswith(f"portrait-{2**64 - 1}.png")
    for seed, message in ((2**64, "at most"), (-2, "at least 0"), ("x", "whole number")):
        refused = pulid("generate", "portrait", "--seed", seed, "-o", tmp_path)
        assert refused.is_one_sentence and message in refused.err
