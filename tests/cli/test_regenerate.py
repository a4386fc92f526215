"""`pulid generate --from`: an image names options; its input files are passed again."""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from openpulid.errors import OptionError, PulidError
from openpulid.identity.identity import Identity
from openpulid.io.metadata import find_text, read_metadata, save_image
from openpulid.pipelines.presets import MINIATURE
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.pipelines.request_inputs import Control, Person
from tests.cli.conftest import FakeStudio, Run

REQUEST: dict[str, Any] = {
    "prompt": "portrait",
    "model": {"preset": "mini"},
    "resolved": True,
}


def write(path: Path, request: Any, **fields: Any) -> Path:
    """Write an image with any parameters."""
    save_image(Image.new("RGB", (32, 32)), path, {"request": request, **fields})
    return path


def write_text(path: Path, text: str) -> Path:
    info = PngInfo()
    info.add_itxt("openpulid", text)
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    return path


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def test_input_files_are_named_again_and_compared(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (96, 96), 255).save("mask.png")
    done = pulid("generate", "portrait", "--id", "anna.png", "--mask", "mask.png", "-o", "out")
    assert done.code == 0, done.err
    again = ("generate", "--from", "out/portrait-0.png", "-o", "again")
    refused = pulid(*again)
    expected = "out/portrait-0.png was generated with anna.png and mask.png; pass --id and --mask."
    assert refused.is_one_sentence and expected in refused.err
    refused = pulid(*again, "--id", "anna.png")
    assert refused.is_one_sentence and "generated with mask.png; pass --mask." in refused.err
    (tmp_path / "moved").mkdir()
    Path("anna.png").rename("moved/renamed.png")
    files = {"--id": Path("moved/renamed.png"), "--mask": Path("mask.png")}
    options = [word for pair in files.items() for word in pair]
    assert pulid(*again, *options).code == 0
    for option, path in files.items():
        content = path.read_bytes()
        Image.new("RGB", (96, 96), "red").save(path)
        refused = pulid(*again, *options)
        expected = f"{path} is not the file that out/portrait-0.png was generated with"
        assert refused.is_one_sentence and expected in refused.err
        assert f"pass the original with {option}" in refused.err
        path.write_bytes(content)
    for option in (("--control-image", "mask.png"), ("--base", "x"), ("--preset", "mini")):
        refused = pulid(*again, *options, *option)
        assert refused.is_one_sentence and f"needs no {option[0]}; leave it out" in refused.err


def test_several_images_of_a_person_are_named_in_order(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    other = tmp_path / "smile.png"
    Image.new("RGB", (80, 80), "white").save(other)
    done = pulid("generate", "portrait", "--id", anna, "--id", other, "-o", tmp_path)
    assert done.code == 0 and studio.requests[0].people == (Person(images=[anna, other]),)
    again = ("generate", "--from", tmp_path / "portrait-0.png", "-o", tmp_path / "again")
    assert pulid(*again, "--id", anna, "--id", other).code == 0
    refused = pulid(*again, "--id", anna)
    assert refused.is_one_sentence and "generated with smile.png; pass --id." in refused.err
    refused = pulid(*again, "--id", other, "--id", anna)
    assert refused.is_one_sentence and f"{other} is not the file" in refused.err
    refused = pulid(*again, "--id", anna, "--id", other, "--id", anna)
    assert refused.is_one_sentence and "needs no --id; leave it out" in refused.err
    refused = pulid("generate", "portrait", "--id", anna, "--id", "ben.safetensors")
    assert refused.is_one_sentence and "several images or one identity file" in refused.err


def test_image_is_regenerated_in_its_folder(
    pulid: Run, studio: FakeStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert pulid("generate", "portrait").code == 0
    image = Path("portrait-0.png")
    content = image.read_bytes()
    assert pulid("generate", "--from", image).out == "portrait-0.png\n"
    # another machine gives other pixels
    metadata = json.loads(read_metadata(image))
    save_image(Image.new("RGB", (32, 32), "red"), image, metadata)
    changed = image.read_bytes()
    assert pulid("generate", "--from", image).out == "portrait-0-2.png\n"
    assert image.read_bytes() == changed != content == Path("portrait-0-2.png").read_bytes()


def test_identity_may_be_extracted_again(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    file = tmp_path / "anna.safetensors"
    pulid("identify", anna, "-o", file, "--face", 0)
    first = Identity.load(file)
    pulid("generate", "portrait", "--id", file, "-o", tmp_path)
    again = ("generate", "--from", tmp_path / "portrait-0.png", "--id", file, "-o", tmp_path)
    later = Identity(first.id_cond, first.hidden, first.models, first.landmarks, "2030-01-01")
    later.save(file)
    assert Identity.load(file).created != first.created
    assert pulid(*again).code == 0
    (first.to("cpu").zeros_like()).save(file)
    refused = pulid(*again)
    assert refused.is_one_sentence and "is not the file that" in refused.err


def test_every_path_is_named_again(pulid: Run, studio: FakeStudio, tmp_path: Path) -> None:
    published = [{"images": ["x.png"]}]
    cases = {
        "--preset": {"model": {"preset": str(MINIATURE)}},
        "--base": {"model": {"preset": "mini", "base": str(MINIATURE / "pipeline")}},
        "--adapter": {"model": {"adapter": str(MINIATURE / "pulid-stage1.safetensors")}},
        "--faces": {"model": {"face_pack": str(tmp_path)}},
        "--control": {"controls": [{"model": str(tmp_path), "image": "x.png"}]},
        "--control-image": {"controls": [{"model": "control-pose", "image": "/etc/hostname"}]},
        "--mask": {"people": [{"images": ["x.png"], "mask": str(MINIATURE)}]},
        "--id": {"people": published},
    }
    for option, fields in cases.items():
        refused = pulid("generate", "--from", write(tmp_path / "0.png", REQUEST | fields))
        assert refused.is_one_sentence and option in refused.err, option
        assert "was generated with" in refused.err
    hub = write(tmp_path / "hub.png", REQUEST | {"model": {"base": "owner/name"}})
    refused = pulid("generate", "--from", hub)
    assert refused.is_one_sentence and "generated with owner/name; pass --base" in refused.err
    # a folder that has the name of a preset is not the preset
    folder = ModelSelection(preset=str(tmp_path / "mini"))
    stored = Provenance(request=GenerationRequest(prompt="portrait", model=folder)).request
    assert stored.model is not None and stored.model.preset == "./mini"


def test_published_names_are_restored_from_python(anna: Path) -> None:
    request = GenerationRequest(
        prompt="portrait",
        people=[Person(images=[anna, anna])],
        controls=[Control("control-pose", anna)],
        model=ModelSelection(preset="sdxl", base="sdxl-base"),
    )
    provenance = Provenance.create(request, {"people.0.images.1": "f" * 64})
    assert provenance.required_files() == {
        "people.0.images.0": "anna.png",
        "people.0.images.1": "anna.png",
        "controls.0.image": "anna.png",
    }
    with pytest.raises(OptionError, match=r"anna.png is not the file that the image was"):
        provenance.restore(dict.fromkeys(provenance.required_files(), anna))
    provenance = Provenance.create(request, {})
    assert provenance.restore(dict.fromkeys(provenance.required_files(), anna)) == request


HOSTILE = {
    "id is true": REQUEST | {"people": [{"images": [True]}]},
    "identity is a number": REQUEST | {"people": [{"identity": 1}]},
    "seed is true": REQUEST | {"seed": True},
    "seed is text": REQUEST | {"seed": "7"},
    "large seed": REQUEST | {"seed": 10**23},
    "many steps": REQUEST | {"num_inference_steps": 10**7},
    "many images": REQUEST | {"num_images": 1000},
    "large image": REQUEST | {"width": 10**6, "height": 10**6},
    "long prompt": REQUEST | {"prompt": "a " * 10**5},
    "no prompt": {**REQUEST, "prompt": None},
    "not a number": REQUEST | {"guidance_scale": float("nan")},
    "infinite start": REQUEST | {"identity": {"start": float("inf")}},
    "nan start": REQUEST | {"identity": {"start": float("nan")}},
    "null byte": REQUEST | {"people": [{"images": ["a\0b"]}]},
    "long path": REQUEST | {"people": [{"images": ["a" * 5000]}]},
    "many people": REQUEST | {"people": [{"images": ["a"]}] * 1000},
    "terminal escape": REQUEST | {"\x1b[2J\n": 1},
    "escape in a value": REQUEST | {"seed": "\x1b]0;owned\x07"},
    "many unknown fields": REQUEST | {f"field {n}": 0 for n in range(5000)},
    "long field": REQUEST | {"x" * 10**5: 0},
    "unknown method": REQUEST | {"model": {"method": "os:system"}},
    "no model": {"prompt": "portrait", "resolved": True},
    "model is null": REQUEST | {"model": None},
    "invisible name": REQUEST | {"people": [{"images": ["\u200b\ufeff\u202egnp.exe"]}]},
    "invisible field": REQUEST | {"\u2066\U000e0041": 0},
    "hub": REQUEST | {"model": {"preset": "owner/name"}},
    "list": [REQUEST],
    "braces": REQUEST | {"{0}{1}": "{2}"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_parameters_are_one_sentence(
    pulid: Run, studio: FakeStudio, tmp_path: Path, name: str
) -> None:
    image = write(tmp_path / "image.png", HOSTILE[name])
    start = time.process_time()
    refused = pulid("generate", "--from", image, "-o", tmp_path)
    assert refused.is_one_sentence and time.process_time() - start < 5
    assert len(refused.err) < 1000 and refused.err.strip().isprintable()
    assert studio.requests == []


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, '{"request":' * 1000, '"\\ud800"', "9" * 10**5, "", "\x00", '{"request": {}}'],
)
def test_text_that_is_no_json_is_one_sentence(pulid: Run, tmp_path: Path, text: str) -> None:
    refused = pulid("generate", "--from", write_text(tmp_path / "image.png", text))
    assert refused.is_one_sentence and "generation parameters" in refused.err


def move_text(data: bytes) -> bytes:
    """Move the text of a PNG file behind its pixels."""
    chunks = split(data)
    moved = sorted(chunks, key=lambda part: part[4:8] == b"iTXt")
    end = next(part for part in moved if part[4:8] == b"IEND")
    moved.remove(end)
    return data[:8] + b"".join([*moved, end])


def split(data: bytes) -> list[bytes]:
    chunks = []
    start = 8
    while start < len(data):
        end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
        chunks.append(data[start:end])
        start = end
    return chunks


def test_text_of_other_programs_is_latin_1(tmp_path) -> None:
    for encoding in ("latin-1", "utf-8"):
        text = chunk(b"tEXt", "openpulid\0café".encode(encoding))
        (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + text)
        assert find_text(tmp_path / "image.png", "openpulid") == "café"


def add_comment(data: bytes) -> bytes:
    """Add a compressed comment, and a color profile, of 2 MB each."""
    comment = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2 << 20)))
    profile = chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 << 20)))
    first, *rest = split(data)
    return data[:8] + first + profile + comment + b"".join(rest)


def as_ztxt(data: bytes) -> bytes:
    """Store the text as ImageMagick does."""
    parts = []
    for part in split(data):
        if part[4:].startswith(b"iTXtopenpulid\0"):
            text = part[8:-4].split(b"\0", 5)[-1]
            part = chunk(b"zTXt", b"openpulid\0\0" + zlib.compress(text))
        parts.append(part)
    return data[:8] + b"".join(parts)


def damage_pixels(data: bytes) -> bytes:
    return b"".join([data[:8], *(part for part in split(data) if part[4:8] != b"IDAT")])


@pytest.mark.parametrize("change", [move_text, add_comment, as_ztxt, damage_pixels])
def test_parameters_are_found_in_images_of_other_programs(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    person = tmp_path / f"schön{anna.suffix}"
    person.write_bytes(anna.read_bytes())
    pulid("generate", "a portrait", "--id", person, "-o", tmp_path)
    image = tmp_path / "a-portrait-0.png"
    original = image.read_bytes()
    image.write_bytes(change(original))
    assert image.read_bytes() != original
    done = pulid("generate", "--from", image, "--id", person, "-o", tmp_path / "again")
    assert done.code == 0, done.err
    assert (tmp_path / "again" / image.name).read_bytes() == original


def test_damaged_files_are_one_sentence(pulid: Run, studio: FakeStudio, tmp_path: Path) -> None:
    pulid("generate", "portrait", "-o", tmp_path)
    data = (tmp_path / "portrait-0.png").read_bytes()
    bomb = chunk(b"zTXt", b"openpulid\0\0" + zlib.compress(bytes(50 << 20)))
    files = {
        "bomb.png": data[:8] + bomb,
        "zlib.png": data[:8] + chunk(b"zTXt", b"openpulid\0\0garbage"),
        "chunks.png": data[:8] + chunk(b"tEXt", b"") * 200_000,
        "long.png": data[:8] + b"\xff\xff\xff\xfftEXtopenpulid\0{}",
        "short.png": data[:20],
        "text.png": b"hello",
        "empty.png": b"",
        "photo.jpg": b"\xff\xd8\xff\xe0",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refused = pulid("generate", "--from", tmp_path / name)
        assert refused.is_one_sentence and "generation parameters" in refused.err, name
    (tmp_path / "folder.png").mkdir()
    for name, reason in {"folder.png": "not a regular file", "none.png": "No such file"}.items():
        refused = pulid("generate", "--from", tmp_path / name)
        assert refused.is_one_sentence and reason in refused.err


def test_mutated_parameters_raise_only_errors_of_the_user(tmp_path: Path) -> None:
    import random

    text = json.dumps({"request": REQUEST | {"people": [{"images": ["anna.png"], "scale": 1}]}})
    generator = random.Random(0)
    for _ in range(500):
        characters = list(text)
        for _ in range(generator.randint(1, 6)):
            characters[generator.randrange(len(characters))] = chr(generator.randrange(32, 127))
        try:
            Provenance.read(write_text(tmp_path / "image.png", "".join(characters))).restore()
        except PulidError as error:
            assert str(error).isprintable()
