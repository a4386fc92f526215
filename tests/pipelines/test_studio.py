"""A studio with tiny random weights: load, identify, generate, and errors of the user."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openpulid import load
from openpulid.device import best_device, select_device
from openpulid.errors import (
    FaceError,
    IdentityError,
    ImageError,
    NonFiniteError,
    OptionError,
    PromptError,
    PulidError,
    WeightsError,
)
from openpulid.faces.miniature import MiniFaceDetector, ResNetRecognition
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import save_module
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines import factory
from openpulid.pipelines.factory import load_extractor
from openpulid.pipelines.presets import flux, mini, mini_lightning
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, IdentityOptions, ModelSelection
from openpulid.pipelines.request_inputs import Person
from openpulid.pipelines.result import UNSAVED_IDENTITY, GenerationResult
from openpulid.pipelines.selection import with_method
from openpulid.pipelines.studio import Studio


@pytest.fixture(scope="module")
def folder(tiny_pipeline, tmp_path_factory) -> Path:
    """Weights on disk. The test decides whether the detector finds a face."""
    folder = tmp_path_factory.mktemp("weights")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "pipeline")
    tiny_pipeline(1).unet.save_pretrained(folder / "lightning")
    torch.manual_seed(0)
    tower = VisionEncoder(
        img_size=32, patch_size=8, embed_dim=8, depth=5, num_heads=2, num_classes=4, ref_grid=None
    )
    save_module(MiniFaceDetector((8, 8, 8)), folder / "detector.safetensors")
    save_module(
        ResNetRecognition(8, (8, 8, 8), (1, 1, 1), dim=12),
        folder / "recognition-encoder.safetensors",
    )
    save_module(tower, folder / "vision-encoder.safetensors")
    adapter = PuLID.for_unet(pipe.unet, IDEncoder(16, 64, vit_dim=8, hidden_dim=16))
    for layer in adapter.id_adapter_attn_layers.values():
        torch.nn.init.normal_(layer.id_to_v.weight)
    adapter.save(folder / "pulid-stage3.safetensors")
    return folder


@pytest.fixture(scope="module")
def studio(folder) -> Studio:
    preset = mini(folder).with_defaults(num_inference_steps=3, scale=1.0)
    studio = load(preset, device="cpu")
    detector = studio.extractor.detector
    with torch.no_grad():  # every image is a face
        detector.score[-1].weight.zero_(), detector.score[-1].bias.fill_(100)
        detector.parts.weight.zero_(), detector.parts.bias.zero_()
        detector.parts.bias[4:8] = 100
    return studio


@pytest.fixture(scope="module")
def anna(studio) -> Identity:
    return studio.identify(picture(0))


def picture(seed: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    )


def pixels(result: GenerationResult) -> list[np.ndarray]:
    return [np.asarray(image).astype(int) for image in result.images]


def test_identity_changes_the_image(studio, anna) -> None:
    [without] = pixels(studio.generate("portrait, film noir", seed=3))
    [someone] = pixels(studio.generate("portrait, film noir", seed=3, identity=anna))
    assert without.shape == (16, 16, 3) and np.abs(without - someone).max() > 3
    [nobody] = pixels(studio.generate("portrait, film noir", seed=3, identity=anna, scale=0))
    assert np.array_equal(nobody, without)
    assert not any(
        part._forward_hooks or part._forward_pre_hooks for part in studio.pipe.unet.modules()
    )


def test_each_seed_gives_its_image_alone(studio, anna) -> None:
    four = studio.generate("portrait", anna, seed=5, num_images=4)
    assert four.seeds == [5, 6, 7, 8]
    for seed, image in zip(four.seeds, pixels(four), strict=True):
        assert np.array_equal(pixels(studio.generate("portrait", anna, seed=seed))[0], image)
    together = pixels(studio.generate("portrait", anna, seed=5, num_images=4, batch_size=3))
    assert max(np.abs(a - b).max() for a, b in zip(together, pixels(four), strict=True)) <= 1
    assert np.abs(together[0] - together[1]).max() > 3


def test_threads_can_share_a_studio(studio, anna) -> None:
    """Nobody in one thread and Anna in the other, each with a guidance of its own."""
    asked = [
        {"identity": anna, "guidance_scale": 1.0},
        {"identity": None, "guidance_scale": 3.0},
    ] * 2
    alone = [
        pixels(studio.generate("portrait", seed=2, num_inference_steps=12, **one)) for one in asked
    ]
    with ThreadPoolExecutor(4) as threads:
        made = list(
            threads.map(
                lambda one: pixels(
                    studio.generate("portrait", seed=2, num_inference_steps=12, **one)
                ),
                asked,
            )
        )
    assert all(np.array_equal(a, b) for a, b in zip(alone, made, strict=True))
    assert not np.array_equal(alone[0], alone[1])


@pytest.mark.parametrize(("num_images", "batch_size"), [(1, 1), (2, 1), (3, 2)])
def test_list_of_people_for_one_image_is_refused_before_any_image(
    studio, anna, num_images: int, batch_size: int
) -> None:
    images = []
    with pytest.raises(OptionError, match=r"several people in one image pass \[\(identity, mask\)"):
        studio.generate(
            "portrait",
            identity=[anna, anna],
            num_images=num_images,
            batch_size=batch_size,
            on_image=lambda *image: images.append(image),
        )
    assert images == []


def test_options_reach_the_sampler(studio, anna) -> None:
    def image(**options: object) -> np.ndarray:
        return pixels(studio.generate("portrait", anna, seed=1, **options))[0]

    usual = image()
    for options in (
        {"num_inference_steps": 4},
        {"guidance_scale": 1.0},
        {"negative_prompt": "red hat"},
        {"scale": 0.3},
        {"start": 0.5},
        {"num_zero": 9},
    ):
        assert not np.array_equal(image(**options), usual), options


def test_unknown_words_are_refused(studio) -> None:
    with pytest.raises(
        PromptError, match=r"'Portait' \(similar: portrait\) and 'zebra'; use words of its"
    ) as error:
        studio.generate("Portait of a zebra, red hat")
    assert error.value.words == ("Portait", "zebra")
    assert "`pulid world words` lists them" in str(error.value)
    with pytest.raises(PromptError, match=r"'zebra' in the negative prompt;"):
        studio.generate("portrait", negative_prompt="zebra")
    with pytest.raises(PromptError, match=r"knows nothing of the prompt '\?!'"):
        studio.generate("?!")


def test_unknown_signs_are_left_out(studio, caplog) -> None:
    expected = pixels(studio.generate("portrait, film noir", negative_prompt="red"))
    assert not caplog.records
    result = studio.generate("portrait, film noir! 😀", negative_prompt="red?")
    assert all(map(np.array_equal, pixels(result), expected))
    notes = [record.getMessage() for record in caplog.records]
    assert notes == [
        "the model does not know '!', '😀'; left out of the prompt",
        "the model does not know '?'; left out of the negative prompt",
    ]
    assert result.requests[0].prompt == "portrait, film noir! 😀"
    # an image is regenerated from its stored request
    assert np.array_equal(pixels(studio.generate(result.requests[0]))[0], expected[0])


def test_end_of_a_long_prompt_is_read(studio, caplog) -> None:
    start = "portrait " + "red " * 9
    images = [
        pixels(studio.generate(prompt)) for prompt in (start, start + "blue hat", start + "hat")
    ]  # 12 tokens with begin and end, and more
    assert len({image.tobytes() for group in images for image in group}) == 3
    assert not caplog.records


def test_options_without_effect_are_noted(studio, anna, caplog) -> None:
    studio.generate("portrait", anna, scale=0.5)
    assert not caplog.records
    studio.generate("portrait", scale=0.5)
    assert "without a person these options have no effect: scale" in caplog.text
    with pytest.raises(OptionError, match="an identity or people, not both"):
        studio.generate("portrait", anna, people=[Person(images=["anna.png"])])
    with pytest.raises(OptionError, match=r"none of the 3 steps is between start 0\.8"):
        studio.generate("portrait", anna, start=0.8, end=0.5)
    caplog.clear()
    with pytest.raises(OptionError, match="for preset"):  # an error alone, without its note
        studio.generate("portrait", anna, width=512)
    assert not caplog.records


def test_empty_negative_prompt_is_encoded(studio) -> None:
    """Without a negative prompt this pipeline uses zeros instead."""
    assert studio.pipe.config.force_zeros_for_empty_prompt
    [none], [empty], [unset] = (
        pixels(studio.generate("portrait", **options))
        for options in ({"negative_prompt": None}, {"negative_prompt": ""}, {})
    )
    assert np.array_equal(none, unset) and not np.array_equal(none, empty)
    expected = studio.pipe(
        "portrait",
        negative_prompt="",
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert np.array_equal(empty, np.asarray(expected.images[0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet.conv_out", "the U-Net gave NaN or infinity in step 1,"),
        ("vae.decoder.conv_out", "the autoencoder gave NaN or infinity"),
        ("text_encoder_2.text_projection", "in step 1,"),
    ],
)
def test_images_that_are_not_finite_are_refused(studio, part: str, message: str, value) -> None:
    module = studio.pipe
    for name in part.split("."):
        module = getattr(module, name)
    parameter = module.weight if module.bias is None else module.bias
    saved = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(value)
    try:
        with pytest.raises(NonFiniteError, match=message):
            studio.generate("portrait")
    finally:
        with torch.no_grad():
            parameter.copy_(saved)
    assert not studio.pipe.vae.decoder._forward_hooks
    assert studio.generate("portrait").images


def test_identity_that_is_not_finite_is_refused(studio, anna) -> None:
    for value in (float("nan"), 1e38):
        broken = Identity(anna.id_cond * value, anna.hidden, anna.models)
        with pytest.raises(IdentityError, match="not finite, or far too large"):
            studio.generate("portrait", broken)


@pytest.mark.parametrize(
    "options",
    [
        {"num_images": 0},
        {"num_inference_steps": 0},
        {"seed": -2},
        {"seed": 10**23},
        {"seed": 2**64 - 1, "num_images": 2},
        {"scale": float("nan")},
        {"scale": -1},
        {"scale": 50},
        {"batch_size": 0},
        {"batch_size": "2"},
        {"batch_size": 1.5},
        {"num_zero": -1},
        {"end": 2},
    ],
)
def test_out_of_range_options_are_refused(studio, anna, options) -> None:
    with pytest.raises(OptionError):
        studio.generate("portrait", anna, **options)


@pytest.mark.parametrize(
    "name", ["start_step", "true_cfg_scale", "timestep_to_start_cfg", "max_sequence_length"]
)
def test_unsupported_options_are_refused(studio, anna, name: str) -> None:
    with pytest.raises(OptionError, match=rf"does not support: {name}\.$"):
        studio.generate("portrait", anna, **{name: 2})


def test_each_method_declares_its_options() -> None:
    sampling = {"negative_prompt", "width", "height", "num_inference_steps", "guidance_scale"}
    shared = sampling | {"scale", "start", "end", "controls", "loras", "embeddings"}
    pulid_only = {"projection", "num_zero", "compiled", "style_image", "pose_from_prompt"}
    assert mini().options - shared == pulid_only
    assert with_method(mini(), "faceid").options == shared
    flux_only = {"true_cfg_scale", "max_sequence_length", "start_step", "timestep_to_start_cfg"}
    assert flux().options - shared == flux_only | {"memory", "pose_from_prompt", "style_image"}
    request = GenerationRequest.from_options(
        prompt="portrait", projection="none", num_zero=0, scale=0.5
    )
    message = "preset 'mini' with faceid does not support: projection, num_zero"
    with pytest.raises(OptionError, match=message):
        with_method(mini(), "faceid").resolve(request)


def test_result_has_the_resolved_request_of_each_image(studio, anna) -> None:
    result = studio.generate(
        "portrait", anna, seed=4, num_images=2, num_inference_steps=2, num_zero=3
    )
    expected = studio.preset.with_defaults(num_inference_steps=2, num_zero=3).defaults
    for request, seed in zip(result.requests, (4, 5), strict=True):
        assert request.resolved and (request.seed, request.num_images) == (seed, 1)
        assert (request.width, request.height) == (16, 16)
        assert request.identity == expected.identity
        assert request.num_inference_steps == 2
        assert GenerationRequest.model_validate_json(request.model_dump_json()) == request


def test_images_are_passed_on_as_soon_as_they_exist(studio, anna, monkeypatch) -> None:
    received: list[int] = []

    def stop_in_the_third(step: int, total: int, preview: object) -> None:
        assert (total, len(received)) == (12, (step - 1) // 3)
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studio.generate(
            "portrait",
            anna,
            seed=4,
            num_images=4,
            on_image=lambda image, request: received.append(request.seed),
            callback=stop_in_the_third,
        )
    assert received == [4, 5]
    monkeypatch.undo()
    studio.generate("portrait", anna)  # nothing is left active


def test_saved_images_can_be_regenerated(studio, anna, tmp_path) -> None:
    result = studio.generate("portrait", anna, seed=4, num_images=2, num_inference_steps=2)
    paths = result.save(tmp_path / "out")
    assert [path.name for path in paths] == ["portrait-4.png", "portrait-5.png"]
    assert result.save(tmp_path / "out") == paths  # the same images
    provenance = Provenance.read(paths[1])
    assert provenance.required_files() == {"people.0.identity": UNSAVED_IDENTITY}
    file = anna.save(tmp_path / "anna.safetensors")
    again = studio.generate(provenance.restore({"people.0.identity": file}))
    assert np.array_equal(pixels(again)[0], pixels(result)[1])
    assert again.save(tmp_path / "out")[0].name == "portrait-5-2.png"  # it names the file
    other = studio.identify(picture(1)).save(tmp_path / "other.safetensors")
    with pytest.raises(OptionError, match="is not the file that"):
        provenance.restore({"people.0.identity": other})
    with pytest.raises(IdentityError, match=f"{UNSAVED_IDENTITY} does not exist"):
        studio.generate(result.requests[0])
    (bare,) = studio.generate("portrait").save(tmp_path / "bare", metadata=False)
    assert Image.open(bare).info.keys() == {"xmp", "XML:com.adobe.xmp"}  # the mark alone


def test_masks_of_python_are_not_stored(studio, anna, tmp_path, caplog) -> None:
    result = studio.generate("portrait", [(anna, torch.ones(2, 2))], num_inference_steps=1)
    (path,) = result.save(tmp_path)
    assert "saved without their request" in caplog.text
    assert "openpulid" not in Image.open(path).info


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_identity_that_is_no_number_is_refused(studio, anna, value: float) -> None:
    broken = Identity(anna.id_cond * value, anna.hidden, anna.models)
    for people in (broken, [(broken, torch.ones(2, 2))], [broken]):
        with pytest.raises(IdentityError, match="not finite"):
            studio.generate("portrait", people)


def test_request_of_files_gives_the_same_image_as_objects(studio, anna, tmp_path) -> None:
    picture(0).save(tmp_path / "anna.png")
    mask = Image.new("L", (16, 16), 255)
    mask.save(tmp_path / "mask.png")
    anna.save(tmp_path / "anna.safetensors")
    expected = pixels(studio.generate("portrait", [(anna, mask)], seed=1, scale=0.5))[0]
    for person in (
        Person(images=[tmp_path / "anna.png"], mask=tmp_path / "mask.png"),
        Person(identity=tmp_path / "anna.safetensors", mask=str(tmp_path / "mask.png")),
    ):
        request = GenerationRequest(
            prompt="portrait", seed=1, people=[person], identity=IdentityOptions(scale=0.5)
        )
        assert np.array_equal(pixels(studio.generate(request))[0], expected)
        scaled = request.model_copy(update={"people": (person.model_copy(update={"scale": 0.0}),)})
        plain = request.without_people()
        results = [pixels(studio.generate(each))[0] for each in (scaled, plain)]
        assert np.array_equal(results[0], results[1])
    with pytest.raises(OptionError, match="in the request, not in addition"):
        studio.generate(request, anna)
    other = request.model_copy(update={"model": ModelSelection(preset="sdxl")})
    with pytest.raises(OptionError, match="selects preset 'sdxl'"):
        studio.generate(other)


def test_people_of_a_request_give_the_same_image_as_objects(studio, anna, tmp_path) -> None:
    """Each in a region of its own; a person's scale is a weight of the mask."""
    ben = studio.identify(picture(1))
    anna.save(tmp_path / "anna.safetensors")
    ben.save(tmp_path / "ben.safetensors")
    Image.fromarray(np.uint8([[0, 255]])).resize((16, 16), 0).save(tmp_path / "right.png")
    left, right = torch.zeros(2, 16, 16)
    left[:, :8] = 1
    right[:, 8:] = 1
    request = GenerationRequest(
        "portrait",
        seed=1,
        people=[
            Person(identity=tmp_path / "anna.safetensors", box=(0, 0, 0.5, 1), scale=0.5),
            Person(identity=tmp_path / "ben.safetensors", mask=tmp_path / "right.png"),
        ],
        identity=IdentityOptions(scale=1.0),
    )
    objects = [(anna, 0.5 * left), (ben, right)]
    expected = pixels(studio.generate("portrait", objects, seed=1, scale=1.0))[0]
    result = studio.generate(request)
    assert np.array_equal(pixels(result)[0], expected)
    (path,) = result.save(tmp_path)
    files = {
        f"people.{k}.identity": tmp_path / f"{name}.safetensors"
        for k, name in ((0, "anna"), (1, "ben"))
    }
    again = Provenance.read(path).restore({**files, "people.1.mask": tmp_path / "right.png"})
    assert np.array_equal(pixels(studio.generate(again))[0], expected)


def test_request_names_the_file_of_the_person(studio: Studio, tmp_path: Path) -> None:
    """So the command that the file passes again reproduces the image."""
    picture(0).save(tmp_path / "anna.png")
    identity = studio.identify(tmp_path / "anna.png").save(tmp_path / "anna.safetensors")
    images = []
    for path, person in (
        (tmp_path / "anna.png", Person(images=[tmp_path / "anna.png"])),
        (identity, Person(identity=identity)),
    ):
        result = studio.generate("portrait, film noir", seed=3, identity=path, scale=0.5)
        (request,) = result.requests
        assert request.people == (person,) and len(result.fingerprints) == 1
        images += pixels(result) + pixels(studio.generate(request))
    assert all(np.array_equal(image, images[0]) for image in images)


def test_identify_from_files(studio, anna, tmp_path) -> None:
    picture(0).save(tmp_path / "anna.png")
    again = studio.identify(tmp_path / "anna.png")
    assert torch.equal(again.id_cond, anna.id_cond) and again.models == anna.models
    assert studio.identify([str(tmp_path / "anna.png"), picture(1)]).photos == 2
    with pytest.raises(ImageError, match=r"nobody\.png"):
        studio.identify(tmp_path / "nobody.png")
    with pytest.raises(OptionError, match="at least one"):
        studio.identify([])


def test_identify_from_everything_that_is_an_image(studio, anna, tmp_path) -> None:
    image = picture(0)
    image.save(tmp_path / "anna.png")
    content = (tmp_path / "anna.png").read_bytes()
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    sources = [array, array / np.float32(255), array.astype(np.uint16) * 257]
    sources += [tensor, tensor / 255, (tensor / 255)[None], array.transpose(2, 0, 1)]
    sources += [content, bytearray(content), memoryview(content), BytesIO(content), [content]]
    for source in sources:
        assert torch.equal(studio.identify(source).id_cond, anna.id_cond), type(source)
    with open(tmp_path / "anna.png", "rb") as file:
        assert torch.equal(studio.identify(file).id_cond, anna.id_cond)
    assert studio.identify([array, picture(1)]).photos == 2
    gray = np.asarray(image.convert("L"))
    assert torch.equal(studio.identify(gray).id_cond, studio.identify(gray[..., None]).id_cond)
    studio.identify(torch.rand(3, 96, 96, dtype=torch.bfloat16, requires_grad=True))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (np.zeros((2, 96, 96, 3), np.uint8), r"has the shape \(2, 96, 96, 3\); an image has"),
        (torch.zeros(96, 96, 96), r"several images are a list"),
        (np.full((96, 96, 3), 200.0), "has values from 200 to 200; float values must be from 0"),
        (torch.full((3, 96, 96), float("nan")), "float values must be from 0 to 1"),
        (np.zeros((96, 96, 3), np.int64), "has the type int64; use uint8"),
        (np.zeros((4, 4, 3), np.uint8), "has 4 x 4 pixels, too few"),
        (5, "expected an image, got int; pass a path, a PIL image, an array"),
        ([{"a": 1}], "expected an image, got dict"),
        (None, "expected an image, got NoneType"),
        (StringIO("text"), 'is a text file; open it with mode "rb"'),
        (b"text", "is not an image of a supported format"),
    ],
)
def test_what_is_no_image_is_refused(studio, source, reason) -> None:
    with pytest.raises(PulidError, match=reason):
        studio.identify(source)


def test_generate_takes_files_and_images_of_a_person(studio, anna, tmp_path) -> None:
    expected = pixels(studio.generate("portrait", anna, seed=1))[0]
    picture(0).save(tmp_path / "anna.png")
    anna.save(tmp_path / "anna.safetensors")
    for identity in (
        str(tmp_path / "anna.png"),
        tmp_path / "anna.png",
        tmp_path / "anna.safetensors",
        picture(0),
        np.asarray(picture(0)),
    ):
        again = studio.generate("portrait", identity=identity, seed=1)
        assert np.array_equal(pixels(again)[0], expected)
    with pytest.raises(ImageError, match=r"nobody\.png: does not exist"):
        studio.generate("portrait", identity="nobody.png")
    with pytest.raises(IdentityError, match=r"nobody\.safetensors does not exist"):
        studio.generate("portrait", identity="nobody.safetensors")
    for people in (5, [5], [("anna.png", None)], ["anna.png", "b.png"]):
        with pytest.raises(OptionError, match="identity"):
            studio.generate("portrait", identity=people)


@pytest.mark.parametrize("request_", [["portrait", "film"], None, 5, {"prompt": "portrait"}])
def test_generate_takes_one_prompt(studio, request_) -> None:
    with pytest.raises(OptionError, match="expected one prompt or a GenerationRequest, got"):
        studio.generate(request_)


def test_size_as_text_or_pair(studio) -> None:
    for size in ("32x16", (32, 16), [32, 16]):
        assert studio.generate("portrait", size=size).images[0].size == (32, 16)
    for size in ("32", 32, (32, 16, 8), None):
        with pytest.raises(OptionError, match="expected WIDTHxHEIGHT"):
            studio.generate("portrait", size=size)
    with pytest.raises(OptionError, match="either size, or width and height"):
        studio.generate("portrait", size="32x16", width=16)


def test_device_that_is_not_there_is_refused(folder) -> None:
    for device in ("no-such-device", "cuda:77", "mps:5", "cpu:7"):
        for function in (lambda name: load(mini(folder), device=name), select_device):
            with pytest.raises(
                OptionError, match=rf"there is no device '{device}' on this machine"
            ):
                function(device)
    assert select_device("cpu") == torch.device("cpu")
    assert select_device(None) == select_device("") == best_device()
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match="there is no device 'cuda' on this machine; availa"):
            load(mini(folder), device="cuda")


def test_device_is_selected_by_name_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert select_device(name) == select_device(torch.device(name)) == torch.device(name)
    with pytest.raises(OptionError, match="'cuda:2' on this machine; available: cpu, cuda, cuda:0"):
        select_device("cuda:2")


def test_image_without_a_known_face_is_refused(folder, tmp_path) -> None:
    studio = load(mini(folder))
    with torch.no_grad():
        studio.extractor.detector.score[-1].bias.fill_(-100)
    picture(0).save(tmp_path / "photo.jpg")
    with pytest.raises(
        FaceError,
        match=(
            r"photo\.jpg: no face detected in its 96 x 96 pixels "
            r"\(at 96 pixels, in four orientations\); this preset only"
        ),
    ) as said:
        studio.identify(tmp_path / "photo.jpg")
    error = said.value
    assert (error.source, error.size, error.search_description) == (
        str(tmp_path / "photo.jpg"),
        (96, 96),
        "at 96 pixels, in four orientations",
    )


def test_identity_of_other_models_is_refused(studio, anna) -> None:
    foreign = Identity(anna.id_cond, anna.hidden, {**anna.models, "vision": "0" * 64})
    mask = torch.ones(2, 2)
    for people in (
        foreign,
        [(foreign, mask)],
        [(anna, mask), (foreign, 1 - mask)],
        [foreign],
        [[(anna, mask), (foreign, mask)]],
    ):
        with pytest.raises(IdentityError, match=r"other models \(vision\)"):
            studio.generate("portrait", people)


def test_saved_identity_loads_no_face_network(folder, anna, tmp_path, monkeypatch) -> None:
    path = anna.save(tmp_path / "anna.safetensors")
    request = GenerationRequest(prompt="portrait", people=[Person(identity=path)])
    loads: list[Any] = []
    original = factory.load_extractor

    def load_extractor(*args: Any) -> Any:
        loads.append(args)
        return original(*args)

    monkeypatch.setattr(factory, "load_extractor", load_extractor)
    studio = load(mini(folder).with_defaults(num_inference_steps=1), device="cpu")
    studio.generate(request)
    foreign = Identity(anna.id_cond, anna.hidden, {**anna.models, "vision": "0" * 64})
    with pytest.raises(IdentityError, match=r"other models \(vision\)"):
        studio.generate("portrait", foreign)
    assert loads == []
    assert studio.extractor is studio.extractor and len(loads) == 1
    assert studio.extractor.models == anna.models

    (folder / "vision-encoder.safetensors").rename(folder / "hidden")
    try:
        with pytest.raises(
            WeightsError, match=r"vision-encoder\.safetensors does not exist; `pulid"
        ):
            load(mini(folder), device="cpu")
    finally:
        (folder / "hidden").rename(folder / "vision-encoder.safetensors")


def test_loaded_extractor_is_used(folder) -> None:
    extractor = load_extractor(mini(folder), torch.device("cpu"))
    assert load(mini(folder), device="cpu", extractor=extractor).extractor is extractor


@pytest.mark.parametrize("method", ["pulid", "photomaker"])
def test_hashes_of_the_extractor_are_those_of_the_loaded_one(method: str) -> None:
    preset = with_method(mini(), method)
    extractor = load_extractor(preset, torch.device("cpu"))
    assert factory.hash_extractor_models(preset.models) == extractor.models


def test_lightning_preset_uses_the_student(folder) -> None:
    studio = load(mini_lightning(folder), device="cpu")
    assert studio.pipe.scheduler.config.timestep_spacing == "trailing"
    base = load(str(folder), device="cpu")
    theirs, ours = (s.pipe.unet.conv_in.weight for s in (base, studio))
    assert not torch.equal(theirs, ours)
    assert studio.generate("portrait").images[0].size == (16, 16)


def test_missing_or_damaged_weights_are_refused(folder, tmp_path) -> None:
    with pytest.raises(OptionError, match="there is no preset"):
        load("no-such-preset")
    with pytest.raises(OptionError, match="expected the name of a preset, such as 'mini', got int"):
        load(7)
    with pytest.raises(WeightsError, match="adapter"):
        load(mini(folder).with_models(adapter=tmp_path / "none.safetensors"))
    with pytest.raises(WeightsError, match="contains no pipeline"):
        load(mini(folder).with_models(pipeline=tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(WeightsError, match="cannot be loaded"):
        load(mini(folder).with_models(pipeline=tmp_path))


def test_extractor_loads_without_base_model_and_adapter(folder, anna, tmp_path) -> None:
    missing = tmp_path / "none.safetensors"
    preset = mini(folder).with_models(pipeline=missing, adapter=missing)
    extractor = load_extractor(preset, torch.device("cpu"))
    assert extractor.models == anna.models


def test_adapter_is_untouched_without_identity(studio, monkeypatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise AssertionError("the adapter is used")

    monkeypatch.setattr(studio.adapter, "use", fail)
    studio.generate("portrait")
