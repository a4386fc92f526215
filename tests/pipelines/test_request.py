"""The request: validation with one sentence per problem, JSON, and defaults of a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from openpulid.cli.options import OPTION_NAMES
from openpulid.errors import OptionError
from openpulid.faces.face import ORDERS
from openpulid.pipelines.presets import PRESETS, flux, mini, sdxl
from openpulid.pipelines.request import (
    SCHEMA_VERSION,
    Control,
    FaceOrder,
    GenerationOptions,
    GenerationRequest,
    IdentityOptions,
    ModelSelection,
    Person,
    RequestError,
    parse_size,
)

FULL = GenerationRequest(
    prompt="portrait {x}",
    negative_prompt="blurry",
    seed=7,
    num_images=2,
    width=832,
    height=1216,
    num_inference_steps=25,
    guidance_scale=7.0,
    people=[Person(images=[Path("anna.jpg")], face_index=1, mask="left.png", scale=0.8)],
    identity=IdentityOptions(start=0.0, end=0.9, projection="ortho_v2", num_zero=20),
    controls=[Control("control-pose", "pose.png", scale=0.7)],
    model=ModelSelection(preset="sdxl"),
)


def test_json_round_trip_is_exact() -> None:
    text = FULL.model_dump_json()
    assert GenerationRequest.model_validate_json(text) == FULL
    assert GenerationRequest.model_validate(FULL.model_dump(exclude_none=True)) == FULL
    assert f'"schema_version":{SCHEMA_VERSION}' in text
    properties = GenerationRequest.model_json_schema()["properties"]
    assert {"prompt", "num_inference_steps", "people", "schema_version"} <= properties.keys()


def test_requests_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        FULL.seed = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "seed must be at least 0, got -1."),
        ({"num_images": 0, "seed": 1.5}, "seed must be a whole number, got 1.5; num_images must"),
        ({"prompt": " "}, "prompt must not be empty."),
        ({"prompt": ""}, "prompt must not be empty."),
        ({"max_sequence_length": 513}, "max_sequence_length must be at most 512, got 513."),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"steps": 4}, "there is no option steps."),
        ({"identity": {"projection": "{0}"}}, "projection must be 'none', 'ortho' or 'ortho_v2'"),
        ({"people": [{"images": ["a.png"], "scale": -1}]}, "people.0.scale must be at least 0"),
        ({"people": [{"images": ["a.png"], "identity": "a"}]}, "either images or an identity"),
        ({"people": [{}]}, "people.0.images is missing: a person needs images or an identity"),
        ({"people": [{"mask": "a.png"}]}, "people.0.mask requires a person"),
        ({"people": [{"identity": "a"}, {"identity": "b"}]}, "can show one person, got 2."),
        ({"controls": [{"model": "control-pose"}]}, "controls.0.image is missing."),
        ({"controls": [Control("a", "b"), Control("c", "d")]}, "one ControlNet, got 2."),
        ({"schema_version": 2}, "schema_version 2 is not supported"),
    ],
)
def test_each_problem_is_one_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        GenerationRequest.model_validate({"prompt": "portrait", **fields})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_invalid_json_is_one_sentence() -> None:
    with pytest.raises(OptionError, match="not valid JSON"):
        GenerationRequest.model_validate_json("{")


def test_errors_can_name_options_of_the_command_line() -> None:
    with pytest.raises(RequestError) as error:
        GenerationRequest.model_validate(
            {"prompt": "portrait", "num_inference_steps": 0, "people": [{"face_index": 1}]}
        )
    expected = (
        "--face requires a person; pass an image with --id; --steps must be at least 1, got 0."
    )
    sentences = str(error.value.rename(OPTION_NAMES)).rstrip(".").split("; ")
    assert sorted(sentences) == sorted(expected.rstrip(".").split("; "))


def test_option_names_are_fields() -> None:
    def has(model: Any, path: list[str]) -> bool:
        field = model.model_fields.get(path[0])
        if field is None or len(path) == 1:
            return field is not None
        parts = {"identity": IdentityOptions, "people": Person, "controls": Control}
        return has({**parts, "model": ModelSelection}[path[0]], path[1:])

    assert all(has(GenerationRequest, path.split(".")) for path in OPTION_NAMES)


def test_face_orders_are_those_of_the_selection() -> None:
    assert set(get_args(FaceOrder)) == set(ORDERS)


def test_options_of_the_identity_can_be_flat() -> None:
    request = GenerationRequest.from_options(prompt="portrait", seed=3, scale=0.5, end=0.9)
    assert request.seed == 3 and request.identity == IdentityOptions(scale=0.5, end=0.9)
    with pytest.raises(OptionError, match="there is no option size"):
        GenerationRequest.from_options(prompt="portrait", size=(96, 96))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_every_option_they_support(name: str) -> None:
    preset = PRESETS[name]()
    resolved = preset.resolve(GenerationRequest(prompt="portrait"))
    assert resolved.resolved and resolved.model.preset == name
    optional = {"controls", "memory", "start_step"}
    optional |= {"width", "height"} if preset.models.is_miniature else set()
    assert set(resolved.list_options()) >= preset.options - optional
    assert preset.resolve(resolved) == resolved
    assert set(preset.defaults.list_options()) <= preset.options


def test_unsupported_options_are_named() -> None:
    request = GenerationRequest(prompt="portrait", true_cfg_scale=3, max_sequence_length=256)
    message = "preset 'sdxl' does not support: true_cfg_scale, max_sequence_length."
    with pytest.raises(OptionError, match=message):
        sdxl().resolve(request)
    with pytest.raises(
        OptionError, match=r"preset 'flux' does not support: projection, controls\."
    ):
        flux().resolve(
            GenerationRequest(
                prompt="portrait",
                identity=IdentityOptions(projection="none"),
                controls=[Control("control-pose", "pose.png")],
            )
        )


def test_size_must_fit_the_base() -> None:
    for preset, width, example in ((mini(), 100, "96x96"), (flux(), 1000, "992x1152")):
        request = GenerationRequest(prompt="portrait", width=width, height=None)
        if preset.models.is_miniature:
            request = request.model_copy(update={"height": 96})
        with pytest.raises(OptionError, match=f"must be multiples of .*, for example {example}"):
            preset.resolve(request)
    assert parse_size("832x1216") == parse_size(" 832×1216 ") == (832, 1216)
    message = "expected WIDTHxHEIGHT, for example 832x1216, got '832'."
    with pytest.raises(OptionError, match=message):
        parse_size("832")


def test_defaults_can_be_partial_requests() -> None:
    options = GenerationOptions.from_options(num_inference_steps=4, start=0.2)
    filled = options.fill_from(sdxl().defaults)
    assert (filled.num_inference_steps, filled.guidance_scale) == (4, 7.0)
    assert filled.identity == IdentityOptions(
        scale=0.8, start=0.2, end=1.0, projection="ortho_v2", num_zero=20
    )
