"""The command line: what it writes, and one plain sentence for everything a user can get wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from openpulid.apps import cli
from openpulid.errors import FaceError, PromptError
from openpulid.identity.identity import Identity
from openpulid.presets import PRESETS
from openpulid.published import WEIGHTS


class Spoken(SimpleNamespace):
    code: int
    out: str
    err: str


@pytest.fixture
def pulid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in this process: `pulid("world", "person", ...)`."""

    def run(*arguments: object) -> Spoken:
        monkeypatch.setattr(sys, "argv", ["pulid", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return Spoken(code=stop.value.code or 0, out=out, err=err)

    return run


class FakeStudio:
    """Stands for a loaded model: remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[dict] = []

    def identify(self, pictures: str | list[str], **options) -> Identity:
        self.chosen = options
        paths = [pictures] if isinstance(pictures, str) else pictures
        if Image.open(paths[0]).getpixel((0, 0)) == (0, 0, 0):
            raise FaceError("no face of the procedural world was found; a real photograph needs the preset sdxl.")
        return Identity(torch.ones(1, len(paths), 4), tuple(torch.ones(1, 3, 2) for _ in range(5)), {"tower": "abc"})

    def show(self, pictures: list[str], **options) -> Image.Image:
        return Image.new("RGB", (64, 16 * len(pictures)))

    def generate(self, prompt: str, identity: Identity | None = None, **options) -> SimpleNamespace:
        if "zebra" in prompt:
            raise PromptError("the miniature does not know the word zebra.", ["zebra"])
        self.asked.append({"prompt": prompt, "identity": identity, **options})
        count = options["num_images"]
        images = [Image.new("RGB", (32, 32), (k, 0, 0)) for k in range(count)]
        return SimpleNamespace(images=images, seeds=[options["seed"] + k for k in range(count)])


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> FakeStudio:
    fake = FakeStudio()
    monkeypatch.setattr(cli, "_studio", lambda preset, device, base=None, memory=None, method=None: fake)
    return fake


@pytest.fixture
def anna(tmp_path: Path) -> Path:
    path = tmp_path / "anna.png"
    Image.new("RGB", (96, 96), "white").save(path)
    return path


def plain(spoken: Spoken) -> bool:
    """One sentence on stderr, nothing on stdout, no traceback."""
    lines = spoken.err.strip().splitlines()
    return spoken.code == 2 and not spoken.out and len(lines) == 1 and lines[0].startswith("pulid: ")


def test_a_person_is_the_same_picture_every_time(pulid, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert pulid("world", "person", "--seed", 1_000_007, "-o", tmp_path / "new" / name).code == 0
    one, two = ((tmp_path / "new" / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two
    assert Image.open(tmp_path / "new" / "a.png").size == (96, 96)


def test_sheet_has_eight_rows_and_columns(pulid, tmp_path: Path) -> None:
    assert pulid("world", "sheet", "-o", tmp_path / "s.png", "--size", 32).code == 0
    assert Image.open(tmp_path / "s.png").size == (8 * 34 - 2, 8 * 34 - 2)


def test_words_are_the_vocabulary(pulid) -> None:
    spoken = pulid("world", "words")
    assert "hat: none, beanie, brimmed" in spoken.out and " portrait " in spoken.out


def test_identify_writes_a_private_file(pulid, studio: FakeStudio, anna: Path, tmp_path: Path) -> None:
    out = tmp_path / "who" / "anna.safetensors"
    assert pulid("identify", anna, anna, "-o", out).code == 0
    assert out.stat().st_mode & 0o777 == 0o600
    assert Identity.load(out).photos == 2


def test_generate_writes_images_with_their_request(pulid, studio: FakeStudio, anna: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--num", 2, "--seed", 7, "--steps", 5, "--scale", 0.5, "-o", out)
    spoken = pulid("generate", "Portrait, film noir!", "--id", anna, *options)
    assert spoken.code == 0, spoken.err
    assert sorted(path.name for path in out.iterdir()) == [
        "portrait-film-noir-7.png",
        "portrait-film-noir-8.png",
    ]
    asked = studio.asked[0]
    assert asked["identity"].photos == 1
    assert (asked["seed"], asked["num_images"], asked["steps"], asked["scale"]) == (7, 2, 5, 0.5)
    assert asked["guidance"] is None  # the preset's own
    request = json.loads(Image.open(out / "portrait-film-noir-8.png").text["openpulid"])
    assert request["prompt"] == "Portrait, film noir!"
    assert (request["seed"], request["steps"], request["id"]) == (8, 5, str(anna))


def test_generate_without_and_with_a_saved_identity(pulid, studio: FakeStudio, anna: Path, tmp_path: Path) -> None:
    pulid("identify", anna, "-o", tmp_path / "anna.safetensors")
    assert pulid("generate", "portrait", "--id", tmp_path / "anna.safetensors", "-o", tmp_path).code == 0
    assert pulid("generate", "portrait", "-o", tmp_path).code == 0
    assert studio.asked[0]["identity"].models == {"tower": "abc"}
    assert studio.asked[1]["identity"] is None


def test_which_face_and_how_photos_join(pulid, studio: FakeStudio, anna: Path, tmp_path: Path) -> None:
    options = ("--face", 1, "--order", "left-right", "--fusion", "mean", "--show", tmp_path / "seen" / "faces.png")
    assert pulid("identify", anna, anna, "-o", tmp_path / "a.safetensors", *options).code == 0
    assert studio.chosen == {"face": 1, "order": "left-right", "fusion": "mean"}
    assert Image.open(tmp_path / "seen" / "faces.png").size == (64, 32)


def test_every_option_counts_and_an_image_is_made_again(pulid, studio: FakeStudio, anna: Path, tmp_path: Path) -> None:
    options = ("--method", "style", "--start", 0.1, "--end", 0.9, "--negative", "blurry", "--size", "832x1216", "--guidance", 2)
    first = pulid("generate", "portrait", "--id", anna, "--mask", anna, "--num", 2, "--seed", 3, *options, "-o", tmp_path / "a")
    assert first.code == 0, first.err
    asked = studio.asked[0]
    assert (asked["projection"], asked["num_zero"], asked["size"]) == ("ortho", 16, (832, 1216))
    assert (asked["start"], asked["end"], asked["negative"], asked["guidance"]) == (0.1, 0.9, "blurry", 2)
    ((person, mask),) = asked["identity"]
    assert person.photos == 1 and mask.size == (96, 96)
    again = pulid("generate", "--from", tmp_path / "a" / "portrait-4.png", "-o", tmp_path / "b")
    assert again.code == 0 and [p.name for p in (tmp_path / "b").iterdir()] == ["portrait-4.png"]
    for name in ("prompt", "seed", "projection", "num_zero", "size", "start", "end", "negative", "guidance"):
        assert studio.asked[1][name] == (4 if name == "seed" else asked[name])


def test_weights_are_listed_and_missing_ones_named(pulid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parsing_bisenet.pth").write_bytes(b"weights")
    monkeypatch.setenv("COLUMNS", "300")
    listed = pulid("weights", "list", "--folder", tmp_path).out
    assert str(tmp_path / "parsing_bisenet.pth") in listed and "not commercial" in listed and "pulid_v1.bin" in listed
    assert "468e13ca13a9" in listed
    (tmp_path / "pulid_v1.bin").write_bytes(b"weights")
    assert pulid("weights", "verify", "pulid-v1", "--folder", tmp_path).out.startswith("pulid-v1: here, and there is nothing")
    damaged = pulid("weights", "verify", "parsing", "--folder", tmp_path)
    assert plain(damaged) and "is damaged" in damaged.err
    entries = [WEIGHTS[name] for name in PRESETS["flux"]().published[1:]]
    for entry in entries:
        (tmp_path / entry.name).write_bytes(b"weights")
    (tmp_path / "FLUX.1-dev").mkdir()
    (tmp_path / "FLUX.1-dev" / "model_index.json").write_text("{}")
    got = pulid("weights", "get", "flux", "parsing", "--folder", tmp_path)  # what is here is not asked for
    assert got.code == 0 and got.out.split() == [str(tmp_path / name) for name in ("FLUX.1-dev", *(e.name for e in entries))]
    missing = pulid("generate", "portrait", "--preset", "sdxl", "-o", tmp_path)
    assert plain(missing) and "`pulid weights get pulid-v1.1`" in missing.err


def test_presets_are_listed_with_what_they_lack(pulid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    listed = pulid("presets", "list").out
    assert all(name in listed for name in PRESETS) and "`pulid weights get sdxl-v1`" in listed
    assert any("mini " in line and "yes" in line for line in listed.splitlines())
    predicted = pulid("presets", "memory", "flux", "--size", "512x512").out
    assert predicted.count("(peak)") == 4 and "text encoders" in predicted


def test_mistakes_are_one_sentence(pulid, studio: FakeStudio, anna: Path, tmp_path: Path) -> None:
    photo, broken, text = tmp_path / "photo.png", tmp_path / "broken.png", tmp_path / "notes.safetensors"
    Image.new("RGB", (96, 96)).save(photo)
    broken.write_bytes(anna.read_bytes()[:70])
    text.write_text("hello")
    out = tmp_path / "x.safetensors"
    for words in (
        ("identify", photo, "-o", out),  # no face that it knows
        ("identify", broken, "-o", out),
        ("identify", tmp_path / "none.png", "-o", out),
        ("identify", tmp_path, "-o", out),
        ("identify", anna, "-o", tmp_path / "x.txt"),
        ("generate", "portrait, a zebra", "--id", anna, "-o", tmp_path),
        ("generate", "portrait", "--id", broken, "-o", tmp_path),
        ("generate", "portrait", "--id", text, "-o", tmp_path),
        ("generate", "portrait", "--id", tmp_path / "none.safetensors", "-o", tmp_path),
        ("generate", "portrait", "-o", anna),  # a file where the folder should be
        ("world", "person", "--seed", 1, "-o", tmp_path / "p.pdf"),
        ("train", "no_such_recipe"),
        ("train", "sdxl_stage1"),  # without photographs
        ("train", "sdxl_stage1", "--data", tmp_path, "-o", tmp_path / "run"),  # without weights
        ("generate", "portrait", "--device", "abacus"),
        ("generate", "-o", tmp_path),  # no prompt
        ("generate", "portrait", "--size", "large", "-o", tmp_path),
        ("generate", "portrait", "--size", "100x101", "-o", tmp_path),
        ("generate", "portrait", "--size", "1000x1000", "--preset", "flux", "-o", tmp_path),
        ("presets", "memory", "flux", "--size", "1000x1000"),
        ("presets", "memory", "sdxl"),
        ("generate", "portrait", "--method", "magic", "-o", tmp_path),
        ("generate", "portrait", "--mask", anna, "-o", tmp_path),  # of nobody
        ("generate", "--from", anna, "-o", tmp_path),
        ("weights", "get", "everything"),
        ("generate", "portrait", "--device", "meta:7x"),
    ):
        spoken = pulid(*words)
        assert plain(spoken), (words, spoken)


def test_no_command_and_bad_options_show_the_usage(pulid) -> None:
    assert "Usage" in pulid().out
    assert pulid("generate", "x", "--num", "0").code == 2
    assert pulid("generate", "x", "--seed", "-1").code == 2
