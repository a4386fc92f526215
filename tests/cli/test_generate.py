"""`pulid generate`: options to a request, and a request to images that can be regenerated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from openpulid import __version__
from openpulid.cli import main as cli
from openpulid.identity.identity import Identity
from openpulid.io.metadata import read_metadata
from openpulid.pipelines.presets import MINIATURE, PRESETS, mini, mini_lightning
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, IdentityOptions
from openpulid.pipelines.request_inputs import InitImage, Person
from tests.cli.conftest import FakeStudio, Run


def test_images_store_their_request(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--num", 2, "--seed", 7, "--steps", 5, "--scale", 0.5, "-o", out)
    done = pulid("generate", "Portrait, film noir!", "--id", anna, *options)
    assert done.code == 0, done.err
    names = ["portrait-film-noir-7.png", "portrait-film-noir-8.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    request = studio.requests[0]
    assert studio.identities[0].photos == 1
    assert (request.seed, request.num_images, request.num_inference_steps) == (7, 2, 5)
    assert request.identity.scale == 0.5
    assert request.guidance_scale == mini().defaults.guidance_scale
    stored = Provenance.read(out / names[1]).request
    assert stored.with_files({"people.0.images.0": anna}) == request.for_image(8, 32, 32)
    assert (stored.prompt, stored.seed) == ("Portrait, film noir!", 8)
    assert stored.people[0].images == ("anna.png",)


def test_identity_is_optional_or_comes_from_a_file(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    file = tmp_path / "anna.safetensors"
    pulid("identify", anna, "-o", file)
    assert pulid("generate", "portrait", "--id", file, "-o", tmp_path).code == 0
    assert pulid("generate", "portrait", "-o", tmp_path).code == 0
    assert studio.identities[0].models == {"vision": "abc"}
    assert studio.identities[1] is None


def test_face_is_detected_before_the_base_is_loaded(
    pulid: Run, studio: FakeStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the studio gets an identity, so that it loads no face models."""
    monkeypatch.setattr("openpulid.pipelines.loading.load", lambda *args: pytest.fail("loaded"))
    Image.new("RGB", (96, 96)).save(tmp_path / "wall.png")
    refused = pulid("generate", "portrait", "--id", tmp_path / "wall.png", "-o", tmp_path)
    assert refused.is_one_sentence and "wall.png: no face detected" in refused.err


def test_missing_person_is_noted(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note = "no --id: the images show no particular person; pass --id IMAGE."
    studio.stop_at = 0  # before the first image is finished
    assert pulid("generate", "portrait", "-o", tmp_path).code == 130
    assert caplog.messages == [note]
    studio.stop_at = None
    caplog.clear()
    assert pulid("generate", "portrait", "-o", tmp_path).code == 0
    assert caplog.messages == [note]
    # a stored request says what it shows
    assert pulid("generate", "--from", tmp_path / "portrait-0.png", "-o", tmp_path).code == 0
    assert pulid("generate", "portrait", "--id", anna, "--face", 0, "-o", tmp_path).code == 0
    assert caplog.messages == [note]
    assert pulid("generate", "portrait", "--grid", f"id={anna}", "-o", tmp_path).code == 0
    assert caplog.messages.count(note) == 1


def test_face_of_an_image_is_stored(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    face = ("--face", 1, "--order", "left-right")
    assert pulid("generate", "portrait", "--id", anna, *face, "-o", tmp_path).code == 0
    image = tmp_path / "portrait-0.png"
    done = pulid("generate", "--from", image, "--id", anna, "-o", tmp_path / "again")
    assert done.code == 0, done.err
    for request, identity in zip(studio.requests, studio.identities, strict=True):
        person = request.people[0]
        assert (person.face_index, person.face_order) == (1, "left-right")
        assert float(identity.id_cond[0, 0, 0]) == 20
    pulid("identify", anna, "-o", tmp_path / "anna.safetensors")
    refused = pulid("generate", "portrait", "--id", tmp_path / "anna.safetensors", "--face", 1)
    expected = "--face cannot be used with an identity file; pass an image with --id."
    assert refused.is_one_sentence and expected in refused.err
    refused = pulid("generate", "portrait", "--face", 1, "-o", tmp_path)
    assert refused.is_one_sentence and "--face requires a person" in refused.err


def test_option_names_of_other_programs(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "mask.png"
    Image.new("L", (96, 96), 255).save(mask)
    identity = ("--id_scale", 0.5, "--start_at", 0.1, "--end-at", 0.9, "--num_zero", 3)
    face = ("--attn_mask", mask, "--input_faces_index", 1, "--input_faces_order", "left-right")
    done = pulid("generate", "portrait", "--id", anna, *identity, *face, "-o", tmp_path)
    assert done.code == 0, done.err
    request = studio.requests[0]
    expected = IdentityOptions(scale=0.5, start=0.1, end=0.9, num_zero=3, projection="none")
    assert request.identity == expected
    person = Person(images=[anna], mask=mask, face_index=1, face_order="left-right")
    assert request.people == (person,)
    guidance = ("--timestep_to_start_cfg", 2, "--true_cfg", 2, "--negative", "red")
    flux = ("--preset", "flux", "--max_sequence_length", 256, "--weight", 0.7)
    done = pulid("generate", "portrait", "--id", anna, *flux, *guidance, "-o", tmp_path)
    assert done.code == 0, done.err
    request = studio.requests[1]
    assert (request.timestep_to_start_cfg, request.max_sequence_length) == (2, 256)
    assert request.identity.scale == 0.7


def test_every_option_counts_and_an_image_is_regenerated(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    identity = ("--id", anna, "--mask", anna, "--method", "style", "--start", 0.1, "--end", 0.9)
    sampling = ("--negative", "red hat", "--size", "96x128", "--guidance", 2)
    images = ("--num", 2, "--seed", 3, "-o", tmp_path / "a")
    first = pulid("generate", "portrait", *identity, *sampling, *images)
    assert first.code == 0, first.err
    request = studio.requests[0]
    assert (request.identity.projection, request.identity.num_zero) == ("ortho", 16)
    assert (request.identity.start, request.identity.end) == (0.1, 0.9)
    assert (request.width, request.height) == (96, 128)
    assert (request.negative_prompt, request.guidance_scale) == ("red hat", 2)
    assert studio.identities[0].photos == 1 and studio.masks[0].size == (96, 96)
    files = ("--id", anna, "--mask", anna)
    image = tmp_path / "a" / "portrait-4.png"
    again = pulid("generate", "--from", image, *files, "-o", tmp_path / "b")
    assert again.code == 0, again.err
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["portrait-4.png"]
    assert studio.requests[1] == request.model_copy(update={"seed": 4, "num_images": 1})


def test_options_override_a_mode(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    mode = ("--method", "style", "--num-zero", 4)
    assert pulid("generate", "portrait", "--id", anna, *mode, "-o", tmp_path).code == 0
    identity = studio.requests[0].identity
    assert (identity.projection, identity.num_zero) == ("ortho", 4)


def test_options_of_flux(pulid: Run, studio: FakeStudio, tmp_path: Path) -> None:
    guidance = ("--true-cfg", 3, "--negative", "blurry", "--start-cfg", 2)
    flux = ("--preset", "flux", "--memory", "16gb", "--start-step", 4, "--text-tokens", 300)
    done = pulid("generate", "portrait", *flux, *guidance, "-o", tmp_path)
    assert done.code == 0, done.err
    expected: dict[str, Any] = {
        "true_cfg_scale": 3,
        "timestep_to_start_cfg": 2,
        "max_sequence_length": 300,
        "negative_prompt": "blurry",
    }
    assert expected.items() <= dict(studio.requests[0]).items()
    assert studio.requests[0].identity.start_step == 4
    stored = json.loads(read_metadata(tmp_path / "portrait-0.png"))["request"]
    assert {**expected, "width": 896, "height": 1152}.items() <= stored.items()
    assert stored["model"] == {"preset": "flux", "memory": "16gb"}
    assert "projection" not in stored["identity"]
    image = tmp_path / "portrait-0.png"
    for level in ("16gb", "12gb"):
        other = () if level == "16gb" else ("--memory", level)
        assert pulid("generate", "--from", image, *other, "-o", tmp_path / "again").code == 0
        assert expected.items() <= dict(studio.requests[-1]).items()
        assert studio.preset.models.memory == level
    style = pulid("generate", "portrait", "--preset", "flux", "--method", "style", "-o", tmp_path)
    assert style.is_one_sentence and "with flux use --start-step" in style.err


def test_compiling_is_chosen_and_stored(pulid: Run, studio: FakeStudio, tmp_path: Path) -> None:
    """With `--from` another choice replaces the stored one, as another memory level does."""
    done = pulid("generate", "portrait", "--compile", "-o", tmp_path)
    assert done.code == 0, done.err
    again = ("generate", "--from", tmp_path / "portrait-0.png", "-o", tmp_path / "again")
    for words in ((), ("--no-compile",), ("--compile",)):
        assert pulid(*again, *words).code == 0
    choices = [request.identity.compiled for request in studio.requests]
    assert choices == [True, True, False, True]


def test_image_is_regenerated_after_defaults_changed(
    pulid: Run, anna: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulid("world", "person", "--seed", 1_000_007, "-o", anna, "--overwrite")
    long = "photo, " * 60  # a preset's own negative prompt may be too long; it is cut
    defaults = mini_lightning().with_defaults(negative_prompt=long, guidance_scale=1.5)
    monkeypatch.setitem(PRESETS, "mini-lightning", lambda: defaults)
    options = ("--id", anna, "--preset", "mini-lightning", "--seed", 2, "-o", tmp_path)
    first = pulid("generate", "portrait, photo", *options)
    assert first.code == 0, first.err
    file = tmp_path / "portrait-photo-2.png"
    image = Image.open(file)
    metadata = json.loads(image.info["openpulid"])
    assert metadata["version"] == __version__
    stored = GenerationRequest.model_validate(metadata["request"])
    expected = defaults.resolve(GenerationRequest(prompt="portrait, photo"))
    expected = expected.for_image(2, 96, 96).model_copy(update={"people": stored.people})
    assert stored == expected
    changed = defaults.with_defaults(
        negative_prompt="photo",
        num_inference_steps=2,
        guidance_scale=2.0,
        scale=0.3,
        end=0.5,
        projection="ortho",
    )
    monkeypatch.setitem(PRESETS, "mini-lightning", lambda: changed)
    again = pulid("generate", "--from", file, "--id", anna, "-o", tmp_path / "again")
    assert again.code == 0, again.err
    assert Image.open(tmp_path / "again" / file.name).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "3",
        "null",
        '"portrait"',
        "{}",
        '{"request": {"seed": 0}}',
        '{"request": {"prompt": "portrait", "schema_version": 2}}',
        "no JSON",
    ],
)
def test_image_without_parameters_is_refused(pulid: Run, tmp_path: Path, text: str) -> None:
    metadata = PngInfo()
    metadata.add_itxt("openpulid", text)
    Image.new("RGB", (32, 32)).save(tmp_path / "other.png", pnginfo=metadata)
    refused = pulid("generate", "--from", tmp_path / "other.png", "-o", tmp_path)
    assert refused.is_one_sentence and "generation parameters" in refused.err


def test_own_adapter_is_used_and_stored(
    pulid: Run, anna: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pulid("world", "person", "--seed", 1_000_007, "-o", anna, "--overwrite")
    command = ("generate", "portrait, photo", "--id", anna, "--preset", "mini-lightning")
    command = (*command, "--steps", 1, "-o")
    adapter = ("--adapter", MINIATURE / "pulid-stage1.safetensors")
    for name, options in (("default", ()), ("own", adapter)):
        done = pulid(*command, tmp_path / name, *options)
        assert done.code == 0, done.err
    image = tmp_path / "own" / "portrait-photo-0.png"
    again = pulid("generate", "--from", image, "--id", anna, *adapter, "-o", tmp_path / "again")
    assert again.code == 0, again.err
    default, own, regenerated = (
        Image.open(tmp_path / name / "portrait-photo-0.png").tobytes()
        for name in ("default", "own", "again")
    )
    assert own == regenerated != default and not caplog.records
    missing = pulid(*command, tmp_path, "--adapter", tmp_path / "none.safetensors")
    assert missing.is_one_sentence and "none.safetensors does not exist" in missing.err


def test_identity_of_other_models_is_refused_also_with_a_mask(
    pulid: Run, anna: Path, tmp_path: Path
) -> None:
    hidden = tuple(torch.ones(1, 3, 2) for _ in range(5))
    file = tmp_path / "other.safetensors"
    Identity(torch.ones(1, 1, 4), hidden, {"vision": "abc"}).save(file)
    for mask in ((), ("--mask", anna)):
        options = ("--id", file, *mask, "--preset", "mini-lightning", "-o", tmp_path)
        refused = pulid("generate", "portrait, photo", *options)
        assert refused.is_one_sentence and "re-create it from its images" in refused.err


def test_out_of_memory_is_one_sentence(
    pulid: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def allocate(amount: int) -> None:
        torch.empty(amount, dtype=torch.uint8)

    def allocate_on_accelerator(amount: int) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {amount} bytes.")

    run = "openpulid.cli.generate.run_request"
    for work in (allocate, allocate_on_accelerator):
        monkeypatch.setattr(run, lambda *_, work=work: work(2**50))
        failed = pulid("generate", "portrait", "-o", tmp_path)
        assert failed.is_one_sentence and "a lower --memory" in failed.err
    monkeypatch.setattr(run, lambda *_: allocate(-1))
    monkeypatch.setattr(sys, "argv", ["pulid", "generate", "portrait", "-o", str(tmp_path)])
    with pytest.raises(RuntimeError, match="negative dimension"):  # a bug keeps its traceback
        cli.main()


def test_from_excludes_other_options(pulid: Run, studio: FakeStudio, tmp_path: Path) -> None:
    assert pulid("generate", "portrait", "-o", tmp_path).code == 0
    again = ("generate", "--from", tmp_path / "portrait-0.png", "-o", tmp_path)
    assert pulid(*again, "--device", "cpu").code == 0
    for options in (("a person",), ("--steps", 5), ("--num", 2), ("--scale", 0.8, "--seed", 0)):
        refused = pulid(*again, *options)
        name = options[0].replace("a person", "prompt")
        assert refused.is_one_sentence and name in refused.err


def test_several_people_have_a_mask_each(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    """And the image is regenerated from their files, in order."""
    ben = tmp_path / "ben.png"
    Image.new("RGB", (96, 96), "gray").save(ben)
    right = tmp_path / "right.png"
    Image.new("L", (96, 96), 255).save(right)
    people = ("--id", anna, "--id", ben, "--mask", "0,0,.5,1", "--mask", right)
    done = pulid("generate", "portrait", *people, "--scale", 0.5, "--scale", 1, "-o", tmp_path)
    assert done.code == 0, done.err
    assert studio.requests[0].people == (
        Person(images=[anna], box=(0, 0, 0.5, 1), scale=0.5),
        Person(images=[ben], mask=right, scale=1.0),
    )
    image = tmp_path / "portrait-0.png"
    inputs = ("--id", anna, "--id", ben, "--mask", right)
    assert pulid("generate", "--from", image, *inputs, "-o", tmp_path / "again").code == 0
    assert studio.requests[1] == studio.requests[0].for_image(0, 32, 32)
    swapped = pulid("generate", "--from", image, "--id", ben, "--id", anna, "--mask", right)
    assert swapped.is_one_sentence and "is not the file that" in swapped.err
    missing = pulid("generate", "--from", image)
    assert missing.is_one_sentence and missing.err.endswith("; pass --id and --mask.\n")
    extra = pulid("generate", "--from", image, *inputs, "--id", anna)
    assert extra.is_one_sentence and "needs no --id; leave it out" in extra.err


def test_two_images_without_masks_are_one_person(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    scales = ("--scale", 0.5, "--scale", 1)
    assert pulid("generate", "portrait", "--id", anna, "--id", anna, "-o", tmp_path).code == 0
    (person,) = studio.requests[0].people
    assert len(person.images) == 2
    for words, expected in (
        (("--mask", anna, "--mask", anna), "1 --id and 2 --mask: several people need one --mask"),
        (scales, "2 --scale and 1 people: pass one --scale for all, or one for each."),
        (("--mask", "0.5,0,0.5,1"), "--mask must be left, top, right, bottom as fractions"),
        (("--mask", "0,0,2,1"), "must be at most 1"),
    ):
        refused = pulid("generate", "portrait", "--id", anna, *words, "-o", tmp_path)
        assert refused.is_one_sentence and expected in refused.err, refused


def test_initial_image_and_inpaint_mask(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "sofa.png"
    Image.new("L", (96, 96), 255).save(mask)
    inputs = ("--init-image", anna, "--inpaint-mask", mask)
    options = ("--strength", 0.9, "--resize", "pad", "-o", tmp_path)
    done = pulid("generate", "portrait", *inputs, *options)
    assert done.code == 0, done.err
    init = InitImage(anna, strength=0.9, mask=mask, resize="pad")
    assert studio.requests[0].init_image == init
    again = pulid("generate", "--from", tmp_path / "portrait-0.png", *inputs, "-o", tmp_path)
    assert again.code == 0, again.err
    assert studio.requests[1].init_image == init
    for words, expected in (
        (("--strength", 0.5), "--init-image is missing"),
        (("--init-image", anna, "--resize", "cropped"), "--resize must be 'crop', 'pad' or"),
        (("--init-image", anna, "--strength", 0.01), "--strength 0.01 runs none of the"),
        (("--init-image", tmp_path / "none.png"), "none.png: does not exist"),
    ):
        refused = pulid("generate", "portrait", *words, "-o", tmp_path)
        assert refused.is_one_sentence and expected in refused.err, refused
