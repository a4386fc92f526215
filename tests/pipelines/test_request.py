"""The request: validation with one sentence per problem, JSON, and defaults of a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from openpulid.cli.options import OPTION_NAMES
from openpulid.errors import OptionError
from openpulid.faces.face import ORDERS
from openpulid.pipelines.presets import (
    NEGATIVE_PROMPT,
    PRESETS,
    Preset,
    flux,
    mini,
    mini_lightning,
    sdxl,
)
from openpulid.pipelines.request import (
    SCHEMA_VERSION,
    FaceRefinement,
    GenerationOptions,
    GenerationRequest,
    IdentityOptions,
    ModelSelection,
    parse_size,
)
from openpulid.pipelines.request_fields import MAX_SEED, FaceOrder, RequestError
from openpulid.pipelines.request_inputs import (
    Control,
    Embedding,
    InitImage,
    Lora,
    Person,
    StyleImage,
)
from openpulid.pipelines.selection import with_method

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
        ({"seed": -2}, "seed must be at least 0, got -2."),
        ({"seed": 2**64}, "seed must be at most 18446744073709551615, got 18446744073709551616."),
        ({"seed": 10**23}, "seed must be at most 18446744073709551615, got 1000"),
        ({"seed": 1e23}, "seed must be at most 18446744073709551615, got 1e+23."),
        ({"seed": float("nan")}, "seed must be a number, got nan."),
        ({"seed": "red"}, "seed must be a whole number, got 'red'."),
        ({"seed": 2**64 - 1, "num_images": 2}, "seed 18446744073709551615 is too large for 2"),
        ({"num_images": 10**9}, "num_images must be at most 1000, got 1000000000."),
        ({"num_inference_steps": 10**7}, "num_inference_steps must be at most 1000"),
        ({"width": 10**6}, "width must be at most 4096, got 1000000."),
        ({"identity": {"scale": 50}}, "scale must be at most 5, got 50."),
        ({"identity": {"scale": float("nan")}}, "scale must be a number, got nan."),
        ({"identity": {"start": float("nan")}}, "start must be at"),
        ({"identity": {"num_zero": 10**6}}, "num_zero must be at most 1000"),
        ({"guidance_scale": 1e9}, "guidance_scale must be at most 100, got 1000000000.0."),
        ({"true_cfg_scale": float("inf")}, "true_cfg_scale must be a number, got inf."),
        ({"prompt": "x" * 10_001}, "prompt must have at most 10000 characters."),
        ({"prompt": ["a", "b"]}, "prompt must be text, got ['a', 'b']."),
        ({"num_images": 0, "seed": 1.5}, "seed must be a whole number, got 1.5; num_images must"),
        ({"prompt": " "}, "prompt must not be empty."),
        ({"prompt": ""}, "prompt must not be empty."),
        ({"max_sequence_length": 513}, "max_sequence_length must be at most 512, got 513."),
        ({"guidance_scale": float("nan")}, "guidance_scale must be"),
        ({"steps": 4}, "no option steps (did you mean 'num_inference_steps'?)."),
        ({"mask": "a.png"}, "mask belongs to a person; use people=[Person(images=[...], mask=..."),
        ({"people": "a.png"}, "people must be a list, got 'a.png'."),
        ({"people": [{"images": "a.png"}]}, "people.0.images must be a list, got 'a.png'."),
        ({"sede": 4}, "there is no option sede (did you mean 'seed'?)."),
        ({"identity": {"projection": "orto"}}, "got 'orto' (did you mean 'ortho'?)."),
        ({"identity": {"projection": "{0}"}}, "projection must be 'none', 'ortho' or 'ortho_v2'"),
        ({"people": [{"images": ["a.png"], "scale": -1}]}, "people.0.scale must be at least 0"),
        ({"people": [{"images": ["a.png"], "identity": "a"}]}, "either images or an identity"),
        ({"people": [{}]}, "people.0.images is missing: a person needs images or an identity"),
        ({"people": [{"mask": "a.png"}]}, "people.0.mask requires a person"),
        (
            {"people": [{"identity": "a", "mask": "m", "box": (0, 0, 1, 1)}]},
            "provide either people.0.mask or people.0.box, not both.",
        ),
        (
            {"people": [{"identity": "a", "box": (0.5, 0, 0.5, 1)}]},
            "people.0.box must be left, top, right, bottom as fractions of the image's sides, such "
            "as 0, 0, 0.5, 1, got 0.5, 0, 0.5, 1.",
        ),
        ({"people": [{"identity": "a", "box": (0, 0, 2, 1)}]}, "people.0.box.2 must be at most 1"),
        ({"people": [{"box": (0, 0, 1, 1)}]}, "people.0.box requires a person"),
        ({"people": 9 * [{"identity": "a"}]}, "people must have at most 8 entries."),
        ({"controls": [{"model": "control-pose"}]}, "controls.0.image is missing."),
        ({"controls": [Control("a", "b")] * 9}, "controls must have at most 8 entries."),
        (
            {"controls": [{"model": "a", "image": "b", "start": 0.5, "end": 0.5}]},
            "controls.0.start 0.5 is not before controls.0.end 0.5, so that the ControlNet would",
        ),
        ({"schema_version": 2}, "schema_version 2 is not supported"),
    ],
)
def test_each_problem_is_one_sentence(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as error:
        GenerationRequest.model_validate({"prompt": "portrait", **fields})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_fields_can_be_given_in_order() -> None:
    """Required ones come first, although a class inherits the others."""
    assert Control("control-pose", "pose.png", 0.5) == Control(
        model="control-pose", image="pose.png", scale=0.5
    )
    assert GenerationRequest("portrait", seed=3) == GenerationRequest(prompt="portrait", seed=3)
    with pytest.raises(OptionError, match="expected at most 7 values, got 8"):
        Control("control-pose", "pose.png", 0.5, 0, 1, "pose", True, 1)
    with pytest.raises(OptionError, match="model is given twice"):
        Control("control-pose", model="control-depth", image="pose.png")


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
        parts |= {"init_image": InitImage, "model": ModelSelection, "loras": Lora}
        parts |= {"embeddings": Embedding, "style_image": StyleImage}
        parts |= {"refine_faces": FaceRefinement}
        return has(parts[path[0]], path[1:])

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
    optional = {"controls", "memory", "start_step", "loras", "embeddings", "style_image"}
    optional |= {"pose_from_prompt", "compiled"}
    optional |= {"width", "height"} if preset.models.is_miniature else set()
    optional |= set() if name.startswith("sdxl") else {"negative_prompt"}
    assert set(resolved.list_options()) >= preset.options - optional
    assert preset.resolve(resolved) == resolved
    assert set(preset.defaults.list_options()) <= preset.options


def test_unsupported_options_are_named() -> None:
    request = GenerationRequest(prompt="portrait", true_cfg_scale=3, max_sequence_length=256)
    message = "preset 'sdxl' does not support: true_cfg_scale, max_sequence_length."
    with pytest.raises(OptionError, match=message):
        sdxl().resolve(request)
    with pytest.raises(
        OptionError, match=r"preset 'flux' does not support: projection, num_zero\."
    ):
        flux().resolve(
            GenerationRequest(
                prompt="portrait",
                identity=IdentityOptions(projection="none", num_zero=8),
            )
        )


@pytest.mark.parametrize(
    ("preset", "control", "message"),
    [
        (
            flux(),
            Control("control-pose", "a.png"),
            "controls.0.model control-pose is for SDXL presets, not for preset 'flux'; use one of "
            "control-flux-edges, control-flux-depth, control-flux-union.",
        ),
        (
            mini(),
            Control("control-flux-edges", "a.png"),
            "controls.0.model control-flux-edges is for FLUX presets, not for preset 'mini'; use "
            "one of control-edges, control-depth, control-pose.",
        ),
        (
            flux(),
            Control("control-flux-union", "a.png"),
            "control-flux-union serves several kinds of control images; set controls.0.kind to "
            "edges, depth or pose.",
        ),
        (
            sdxl(),
            Control("control-pose", "a.png", kind="depth"),
            "control-pose follows pose alone; leave out controls.0.kind depth, or choose another "
            "ControlNet.",
        ),
    ],
)
def test_controlnet_must_suit_the_preset(preset: Preset, control: Control, message: str) -> None:
    with pytest.raises(RequestError) as error:
        preset.resolve(GenerationRequest(prompt="portrait", controls=[control]))
    assert str(error.value) == message


def test_union_of_kinds_accepts_any_kind_and_ready_maps() -> None:
    controls = [
        Control("control-flux-union", "a.png", kind="pose"),
        Control("control-flux-union", "b.png", is_map=True),
        Control("some-directory", "c.png"),
    ]
    assert flux().resolve(GenerationRequest(prompt="portrait", controls=controls)).resolved


def test_size_must_fit_the_base() -> None:
    for preset, width, example in ((mini(), 100, "96x96"), (flux(), 1000, "992x1152")):
        request = GenerationRequest(prompt="portrait", width=width, height=None)
        if preset.models.is_miniature:
            request = request.model_copy(update={"height": 96})
        with pytest.raises(OptionError, match=f"must be multiples of .*, for example {example}"):
            preset.resolve(request)
    assert parse_size("832x1216") == parse_size(" 832×1216 ") == (832, 1216)
    message = "expected WIDTHxHEIGHT in pixels, got '832'."
    with pytest.raises(OptionError, match=message):
        parse_size("832")


@pytest.mark.parametrize(
    ("preset", "size"),
    [
        (mini(), (512, 512)),
        (mini(), (832, 1216)),
        (mini(), (96, 8)),
        (sdxl(), (8, 1024)),
        (sdxl(), (1024, 4096)),
        (flux(), (2064, 1024)),
    ],
)
def test_presets_know_their_sizes(preset: Preset, size: tuple[int, int]) -> None:
    request = GenerationRequest(prompt="portrait", width=size[0], height=size[1])
    low, high = preset.models.min_side, preset.models.max_side
    message = f"{size[0]}x{size[1]}: --width and --height must be from {low} to {high} for preset"
    with pytest.raises(RequestError) as error:
        preset.resolve(request)
    assert message in str(error.value.rename({"width": "--width", "height": "--height"}))


@pytest.mark.parametrize(
    ("preset", "size", "is_unusual"),
    [
        (mini(), (None, None), False),
        (mini(), (128, 128), True),
        (mini(), (64, 64), True),
        (sdxl(), (512, 512), True),
        (sdxl(), (64, 64), True),
        (sdxl(), (832, 1216), False),
        (sdxl(), (768, 768), False),
        (flux(), (512, 512), False),
    ],
)
def test_unusual_sizes_are_noted(
    preset: Preset, size: tuple[int | None, int | None], is_unusual: bool
) -> None:
    request = GenerationRequest(prompt="portrait", width=size[0], height=size[1])
    notes = preset.describe_ineffective(request, False)
    assert len(notes) == is_unusual
    assert not is_unusual or "trained at about" in notes[0]


@pytest.mark.parametrize("seed", [None, -1, "-1", -1.0])
def test_random_seed_is_drawn_and_stored(seed: Any) -> None:
    """Other programs draw a seed for None or -1."""
    seeds = {GenerationRequest(prompt="portrait", seed=seed).seed for _ in range(8)}
    assert len(seeds) > 1 and all(0 <= each < 2**32 for each in seeds)
    request = GenerationRequest(prompt="portrait", seed=seed)
    assert GenerationRequest.model_validate_json(request.model_dump_json()) == request


def test_largest_seed_is_accepted() -> None:
    import torch

    request = GenerationRequest(prompt="portrait", seed=MAX_SEED - 1, num_images=2)
    last = request.seed + request.num_images - 1
    assert torch.Generator().manual_seed(last).initial_seed() == MAX_SEED
    assert GenerationRequest(prompt="portrait", seed=float(2**53)).seed == 2**53


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.8, "end": 0.5}, r"none of the 4 steps is between start 0\.8 and end 0\.5"),
        ({"start": 0.9}, r"none of the 4 steps is between start 0\.9 and end 1"),  # last at 0.75
        ({"end": 0}, r"none of the 4 steps is between start 0 and end 0"),
        ({"start": 0.3, "end": 0.4}, "none of the 4 steps"),
        ({"start": 0.75}, None),
        ({"start": 0.25, "end": 0.26}, None),
        ({"end": 0, "scale": 0}, None),  # nobody is asked for
    ],
)
def test_span_without_a_step_is_refused(options: dict[str, float], message: str | None) -> None:
    request = GenerationRequest.from_options(
        prompt="portrait", people=[Person(images=["anna.png"])], **options
    )
    if message is None:
        mini_lightning().resolve(request)
    else:
        with pytest.raises(RequestError, match=message):
            mini_lightning().resolve(request)
    mini_lightning().resolve(request.without_people())


def test_photomaker_starts_after_its_first_step() -> None:
    request = GenerationRequest.from_options(
        prompt="portrait", people=[Person(images=["anna.png"])], num_inference_steps=1
    )
    mini().resolve(request)
    with pytest.raises(RequestError, match=r"none of the 1 steps is between start 0\.2"):
        with_method(mini(), "photomaker").resolve(request)
    with pytest.raises(RequestError, match=r"0\.75"):
        last = request.model_copy(
            update={"num_inference_steps": 4, "identity": IdentityOptions(start=0.75)}
        )
        with_method(mini(), "photomaker").resolve(last)


def test_flux_steps_after_the_last_are_refused() -> None:
    people = [Person(images=["anna.png"])]
    late = GenerationRequest.from_options(prompt="portrait", people=people, start_step=28)
    with pytest.raises(RequestError, match="start_step 28 is after the last step, 27"):
        flux().resolve(late)
    options = {"true_cfg_scale": 3, "negative_prompt": "red"}
    guided = GenerationRequest(prompt="portrait", timestep_to_start_cfg=28, **options)
    with pytest.raises(RequestError, match="timestep_to_start_cfg 28 is after the last step"):
        flux().resolve(guided)


def test_empty_negative_prompt_is_not_a_missing_one() -> None:
    def resolve(preset: Preset, **options: Any) -> str | None:
        return preset.resolve(GenerationRequest(prompt="portrait", **options)).negative_prompt

    assert resolve(sdxl()) == NEGATIVE_PROMPT
    assert resolve(sdxl(), negative_prompt="") == ""
    assert resolve(mini()) is None and resolve(mini(), negative_prompt="") == ""
    assert resolve(flux(), negative_prompt="", true_cfg_scale=3) == ""
    for options in ({"true_cfg_scale": 3}, {"negative_prompt": "red"}):
        with pytest.raises(RequestError, match="only work together"):
            resolve(flux(), **options)


@pytest.mark.parametrize(
    ("preset", "options", "is_person_shown", "note"),
    [
        (mini(), {"scale": 0.5, "num_zero": 3}, False, "no effect: scale, num_zero"),
        (mini(), {"scale": 0.5, "num_zero": 3}, True, ""),
        (mini(), {"model": ModelSelection(method="instantid")}, False, "no effect: method"),
        (mini_lightning(), {"negative_prompt": "red hat"}, True, "negative prompt has no effect"),
        (mini(), {"negative_prompt": "red hat"}, True, ""),
        (mini(), {"guidance_scale": 0.5}, True, "guidance_scale 0.5 has the effect of 1"),
        (flux(), {"timestep_to_start_cfg": 2}, True, "timestep_to_start_cfg has no effect"),
        (flux(), {"start": 0.5, "start_step": 2}, True, "start has no effect next to start_step"),
        (flux(), {"guidance_scale": 0.5}, True, ""),
    ],
)
def test_options_without_effect_are_noted(
    preset: Preset, options: dict[str, Any], is_person_shown: bool, note: str
) -> None:
    request = GenerationRequest.from_options(prompt="portrait", **options)
    notes = preset.describe_ineffective(request, is_person_shown)
    assert len(notes) == bool(note) and note in "".join(notes)
    assert preset.describe_ineffective(preset.resolve(preset_request(request)), False) == []


def preset_request(request: GenerationRequest) -> GenerationRequest:
    return request.model_copy(update={"model": None})


def test_several_people_have_a_region_each() -> None:
    anna = Person(identity="a", box=(0, 0, 0.5, 1))
    request = GenerationRequest("portrait", people=[anna, Person(identity="b")])
    with pytest.raises(RequestError) as error:
        mini().resolve(request)
    assert str(error.value) == (
        "each of several people needs people.1.mask or people.1.box, which say where in the image "
        "the person is; person 2 has none."
    )
    mini().resolve(request.model_copy(update={"people": request.people[:1]}))


def test_mask_needs_pulid() -> None:
    person = Person(images=["anna.png"], mask="left.png")
    request = GenerationRequest(prompt="portrait", people=[person])
    mini().resolve(request)
    with pytest.raises(
        RequestError, match=r"people\.0\.mask is only supported by PuLID and InfiniteYou, not"
    ):
        with_method(mini(), "faceid").resolve(request)


def test_defaults_can_be_partial_requests() -> None:
    options = GenerationOptions.from_options(num_inference_steps=4, start=0.2)
    filled = options.fill_from(sdxl().defaults)
    assert (filled.num_inference_steps, filled.guidance_scale) == (4, 7.0)
    assert filled.identity == IdentityOptions(
        scale=0.8, start=0.2, end=1.0, projection="ortho_v2", num_zero=20
    )
