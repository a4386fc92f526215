"""The command line: what it writes, and one plain sentence for everything a user can get wrong."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from openpulid import __version__
from openpulid.cli import main as cli
from openpulid.cli import weights as stores
from openpulid.errors import FaceError, PromptError
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import sha256
from openpulid.io.hub import WEIGHTS
from openpulid.io.metadata import save_image
from openpulid.pipelines.presets import MINIATURE, PRESETS, Preset, mini, mini_lightning, options_of
from openpulid.pipelines.studio import GenerationResult


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
        self.preset = mini()

    def loaded(self, preset: Preset, device: str | None) -> FakeStudio:
        self.preset = preset
        return self

    def identify(self, pictures: str | list[str], **options) -> Identity:
        self.chosen = options
        paths = [pictures] if isinstance(pictures, str) else pictures
        if Image.open(paths[0]).getpixel((0, 0)) == (0, 0, 0):
            raise FaceError(
                "no face of the procedural world was found; a real photograph needs the preset sdxl."
            )
        return Identity(
            torch.ones(1, len(paths), 4),
            tuple(torch.ones(1, 3, 2) for _ in range(5)),
            {"tower": "abc"},
        )

    def show(self, pictures: list[str], **options) -> Image.Image:
        return Image.new("RGB", (64, 16 * len(pictures)))

    def generate(
        self, prompt: str, identity: Identity | None = None, **options
    ) -> GenerationResult:
        if "zebra" in prompt:
            raise PromptError("the miniature does not know the word zebra.", ["zebra"])
        self.asked.append(
            {"prompt": prompt, "identity": identity, **options, **options_of(self.preset)}
        )
        images = [
            Image.new("RGB", self.preset.size or (32, 32), (k, 0, 0))
            for k in range(options["num_images"])
        ]
        return GenerationResult(
            images, [options["seed"] + k for k in range(len(images))], self.preset
        )


@pytest.fixture
def studio(monkeypatch: pytest.MonkeyPatch) -> FakeStudio:
    fake = FakeStudio()
    monkeypatch.setattr(cli, "_studio", fake.loaded)
    monkeypatch.setattr(cli, "_reader", lambda preset, device, method, faces: fake)
    return fake


@pytest.fixture
def anna(tmp_path: Path) -> Path:
    path = tmp_path / "anna.png"
    Image.new("RGB", (96, 96), "white").save(path)
    return path


def plain(spoken: Spoken) -> bool:
    """One sentence on stderr, nothing on stdout, no traceback."""
    lines = spoken.err.strip().splitlines()
    return (
        spoken.code == 2 and not spoken.out and len(lines) == 1 and lines[0].startswith("pulid: ")
    )


def test_a_person_is_the_same_picture_every_time(pulid, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert (
            pulid("world", "person", "--seed", 1_000_007, "-o", tmp_path / "new" / name).code == 0
        )
    one, two = ((tmp_path / "new" / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two
    assert Image.open(tmp_path / "new" / "a.png").size == (96, 96)


def test_sheet_has_eight_rows_and_columns(pulid, tmp_path: Path) -> None:
    assert pulid("world", "sheet", "-o", tmp_path / "s.png", "--size", 32).code == 0
    assert Image.open(tmp_path / "s.png").size == (8 * 34 - 2, 8 * 34 - 2)


def test_words_are_the_vocabulary(pulid) -> None:
    spoken = pulid("world", "words")
    assert "hat: none, beanie, brimmed" in spoken.out and " portrait " in spoken.out


def test_identify_writes_a_private_file(
    pulid, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    out = tmp_path / "who" / "anna.safetensors"
    assert pulid("identify", anna, anna, "-o", out).code == 0
    assert out.stat().st_mode & 0o777 == 0o600
    assert Identity.load(out).photos == 2


def test_generate_writes_images_with_their_request(
    pulid, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
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
    assert asked["guidance"] == mini().guidance
    request = json.loads(Image.open(out / "portrait-film-noir-8.png").text["openpulid"])
    assert request["prompt"] == "Portrait, film noir!"
    assert (request["seed"], request["steps"], request["id"]) == (8, 5, str(anna))


def test_generate_without_and_with_a_saved_identity(
    pulid, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    pulid("identify", anna, "-o", tmp_path / "anna.safetensors")
    assert (
        pulid("generate", "portrait", "--id", tmp_path / "anna.safetensors", "-o", tmp_path).code
        == 0
    )
    assert pulid("generate", "portrait", "-o", tmp_path).code == 0
    assert studio.asked[0]["identity"].models == {"tower": "abc"}
    assert studio.asked[1]["identity"] is None


def test_which_face_of_a_picture_an_image_shows(
    pulid, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    made = pulid(
        "generate", "portrait", "--id", anna, "--face", 1, "--order", "left-right", "-o", tmp_path
    )
    assert made.code == 0 and studio.chosen == {"face": 1, "order": "left-right"}
    studio.chosen = None
    assert (
        pulid("generate", "--from", tmp_path / "portrait-0.png", "-o", tmp_path / "again").code == 0
    )
    assert studio.chosen == {"face": 1, "order": "left-right"}
    pulid("identify", anna, "-o", tmp_path / "anna.safetensors")
    for who in (("--id", tmp_path / "anna.safetensors"), ()):
        refused = pulid("generate", "portrait", *who, "--face", 1, "-o", tmp_path)
        assert plain(refused) and "--face chooses in a picture" in refused.err


def test_options_by_the_names_that_other_programs_give_them(
    pulid, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    Image.new("L", (96, 96), 255).save(tmp_path / "mask.png")
    names = (
        "--id_scale",
        0.5,
        "--start_at",
        0.1,
        "--end-at",
        0.9,
        "--attn_mask",
        tmp_path / "mask.png",
        "--num_zero",
        3,
    )
    faces = ("--input_faces_index", 1, "--input_faces_order", "left-right")
    assert pulid("generate", "portrait", "--id", anna, *names, *faces, "-o", tmp_path).code == 0
    asked = studio.asked[0]
    assert {"scale": 0.5, "start": 0.1, "end": 0.9, "num_zero": 3}.items() <= asked.items() and len(
        asked["identity"]
    ) == 1
    assert studio.chosen == {"face": 1, "order": "left-right"}
    flux = (
        "--timestep_to_start_cfg",
        2,
        "--max_sequence_length",
        256,
        "--true_cfg",
        2,
        "--negative",
        "red",
    )
    assert (
        pulid(
            "generate",
            "portrait",
            "--id",
            anna,
            "--preset",
            "flux",
            *flux,
            "--weight",
            0.7,
            "-o",
            tmp_path,
        ).code
        == 0
    )
    assert {"scale": 0.7, "timestep_to_start_cfg": 2, "text_tokens": 256}.items() <= studio.asked[
        1
    ].items()


def test_which_face_and_how_photos_join(
    pulid, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    options = (
        "--face",
        1,
        "--order",
        "left-right",
        "--fusion",
        "mean",
        "--show",
        tmp_path / "seen" / "faces.png",
    )
    assert pulid("identify", anna, anna, "-o", tmp_path / "a.safetensors", *options).code == 0
    assert studio.chosen == {"face": 1, "order": "left-right", "fusion": "mean"}
    assert Image.open(tmp_path / "seen" / "faces.png").size == (64, 32)


def test_every_option_counts_and_an_image_is_made_again(
    pulid, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    options = (
        "--method",
        "style",
        "--start",
        0.1,
        "--end",
        0.9,
        "--negative",
        "blurry",
        "--size",
        "832x1216",
        "--guidance",
        2,
    )
    first = pulid(
        "generate",
        "portrait",
        "--id",
        anna,
        "--mask",
        anna,
        "--num",
        2,
        "--seed",
        3,
        *options,
        "-o",
        tmp_path / "a",
    )
    assert first.code == 0, first.err
    asked = studio.asked[0]
    assert (asked["projection"], asked["num_zero"], asked["size"]) == ("ortho", 16, (832, 1216))
    assert (asked["start"], asked["end"], asked["negative"], asked["guidance"]) == (
        0.1,
        0.9,
        "blurry",
        2,
    )
    ((person, mask),) = asked["identity"]
    assert person.photos == 1 and mask.size == (96, 96)
    again = pulid("generate", "--from", tmp_path / "a" / "portrait-4.png", "-o", tmp_path / "b")
    assert again.code == 0 and [p.name for p in (tmp_path / "b").iterdir()] == ["portrait-4.png"]
    for name in (
        "prompt",
        "seed",
        "projection",
        "num_zero",
        "size",
        "start",
        "end",
        "negative",
        "guidance",
    ):
        assert studio.asked[1][name] == (4 if name == "seed" else asked[name])


def test_what_is_said_goes_before_what_a_way_brings(
    pulid, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    assert (
        pulid(
            "generate",
            "portrait",
            "--id",
            anna,
            "--method",
            "style",
            "--num-zero",
            4,
            "-o",
            tmp_path,
        ).code
        == 0
    )
    assert (studio.asked[0]["projection"], studio.asked[0]["num_zero"]) == ("ortho", 4)


def test_what_flux_alone_has(pulid, studio: FakeStudio, tmp_path: Path) -> None:
    guided = (
        "--true-cfg",
        3,
        "--negative",
        "blurry",
        "--start-cfg",
        2,
        "--start-step",
        4,
        "--text-tokens",
        300,
    )
    flux = ("--preset", "flux", "--memory", "16gb")
    made = pulid("generate", "portrait", *flux, *guided, "-o", tmp_path)
    assert made.code == 0, made.err
    known = {
        "true_cfg": 3,
        "timestep_to_start_cfg": 2,
        "start_step": 4,
        "text_tokens": 300,
        "negative": "blurry",
    }
    assert known.items() <= studio.asked[0].items()
    request = json.loads(Image.open(tmp_path / "portrait-0.png").info["openpulid"])
    assert {
        **known,
        "memory": "16gb",
        "size": "896x1152",
        "projection": None,
    }.items() <= request.items()
    for level in ("16gb", "12gb"):
        other = () if level == "16gb" else ("--memory", level)
        assert (
            pulid(
                "generate", "--from", tmp_path / "portrait-0.png", *other, "-o", tmp_path / "again"
            ).code
            == 0
        )
        assert known.items() <= studio.asked[-1].items() and studio.preset.memory == level
    style = pulid("generate", "portrait", "--preset", "flux", "--method", "style", "-o", tmp_path)
    assert plain(style) and "--start-step says it" in style.err


def test_an_image_is_made_again_after_the_defaults_have_changed(
    pulid, anna: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulid("world", "person", "--seed", 1_000_007, "-o", anna)
    long = "photo, " * 60  # a preset's own may be, and is cut
    monkeypatch.setitem(
        PRESETS, "mini-lightning", lambda: replace(mini_lightning(), negative=long, guidance=1.5)
    )
    first = pulid(
        "generate",
        "portrait, photo",
        "--id",
        anna,
        "--preset",
        "mini-lightning",
        "--seed",
        2,
        "-o",
        tmp_path,
    )
    assert first.code == 0, first.err
    image = Image.open(tmp_path / "portrait-photo-2.png")
    request = json.loads(image.info["openpulid"])
    used = {
        "steps": 4,
        "guidance": 1.5,
        "scale": 1.0,
        "start": 0.0,
        "end": 1.0,
        "projection": "none",
        "num_zero": 0,
    }
    assert {
        **used,
        "negative": long,
        "size": "96x96",
        "version": __version__,
    }.items() <= request.items()
    changed = {
        "steps": 2,
        "guidance": 2.0,
        "scale": 0.3,
        "end": 0.5,
        "projection": "ortho",
        "negative": "photo",
    }
    monkeypatch.setitem(PRESETS, "mini-lightning", lambda: replace(mini_lightning(), **changed))
    again = pulid("generate", "--from", tmp_path / "portrait-photo-2.png", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    assert Image.open(tmp_path / "again" / "portrait-photo-2.png").tobytes() == image.tobytes()


def test_images_of_older_versions_are_made_again(
    pulid, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    """They have no fingerprints, and on FLUX options that did nothing."""
    older = {"prompt": "portrait", "id": str(anna), "preset": "flux", "seed": 3, "steps": 5}
    idle = {"projection": "ortho", "num_zero": 16}
    save_image(Image.new("RGB", (32, 32)), tmp_path / "older.png", {**older, **idle})
    assert pulid("generate", "--from", tmp_path / "older.png", "-o", tmp_path).code == 0
    asked = studio.asked[0]
    assert (asked["steps"], asked["seed"], asked["guidance"]) == (5, 3, PRESETS["flux"]().guidance)
    assert asked["identity"].photos == 1


def test_an_image_is_made_again_of_the_same_files_or_not_at_all(
    pulid, studio: FakeStudio, anna: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (96, 96), 255).save("mask.png")
    made = pulid("generate", "portrait", "--id", "anna.png", "--mask", "mask.png", "-o", "out")
    assert made.code == 0, made.err
    text = Image.open("out/portrait-0.png").info["openpulid"]
    request = json.loads(text)
    assert (request["id"], request["mask"]) == ("anna.png", "mask.png") and str(
        tmp_path
    ) not in text
    assert request["fingerprints"] == {"id": sha256("anna.png"), "mask": sha256("mask.png")}
    again = ("generate", "--from", "out/portrait-0.png", "-o", "again")
    for name, said in (
        ("anna.png", "may hold somebody else now"),
        ("mask.png", "would make another image"),
    ):
        before = Path(name).read_bytes()
        Image.new("RGB", (96, 96), "red").save(name)
        refused = pulid(*again)
        assert (
            plain(refused)
            and f"{name} has changed since out/portrait-0.png was made" in refused.err
            and said in refused.err
        )
        Path(name).write_bytes(before)
    assert pulid(*again).code == 0 and len(studio.asked) == 2
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    gone = pulid("generate", "--from", "../out/portrait-0.png", "-o", ".")
    assert plain(gone) and "was made with anna.png, which is not here" in gone.err


def test_what_an_image_was_made_with_and_is_not_here(
    pulid, studio: FakeStudio, tmp_path: Path
) -> None:
    known = {"prompt": "portrait", "preset": "mini", "seed": 0}
    missing = (
        {"id": "anna.jpg, face.jpg"},
        {"id": "x" * 300},
        {"adapter": "none.bin"},
    )  # as the page says photos; and others
    for number, more in enumerate((*missing, {"base": "none.ckpt", "fingerprints": {"base": "a"}})):
        image = tmp_path / f"{number}.png"
        save_image(Image.new("RGB", (32, 32)), image, {**known, **more})
        refused = pulid("generate", "--from", image, "-o", tmp_path)
        assert (
            plain(refused)
            and f"was made with {next(iter(more.values()))}, which is not here" in refused.err
        )
    save_image(Image.new("RGB", (32, 32)), tmp_path / "hub.png", {**known, "base": "owner/name"})
    assert pulid("generate", "--from", tmp_path / "hub.png", "-o", tmp_path).code == 0


@pytest.mark.parametrize(
    "text", ["[1]", "3", "null", '"portrait"', "{}", '{"prompt": "portrait", "seed": 0}', "no JSON"]
)
def test_an_image_that_does_not_say_how_it_was_made(pulid, tmp_path: Path, text: str) -> None:
    told = PngInfo()
    told.add_itxt("openpulid", text)
    Image.new("RGB", (32, 32)).save(tmp_path / "other.png", pnginfo=told)
    refused = pulid("generate", "--from", tmp_path / "other.png", "-o", tmp_path)
    assert plain(refused) and "does not say how it was made" in refused.err


def test_faces_are_read_without_a_base_model(pulid, anna: Path, tmp_path: Path) -> None:
    """Of the miniature only what reads faces, and a pipeline that cannot be loaded."""
    pulid("world", "person", "--seed", 1_000_007, "-o", anna)
    (tmp_path / "mine" / "pipeline").mkdir(parents=True)
    (tmp_path / "mine" / "pipeline" / "model_index.json").write_text("{}")
    for name in ("detector", "recognition-encoder", "vision-encoder"):
        (tmp_path / "mine" / f"{name}.safetensors").symlink_to(MINIATURE / f"{name}.safetensors")
    for words in (("--preset", tmp_path / "mine"), ()):
        done = pulid("identify", anna, "-o", tmp_path / f"{len(words)}.safetensors", *words)
        assert done.code == 0, done.err
    known, usual = (Identity.load(tmp_path / f"{k}.safetensors") for k in (2, 0))
    assert torch.equal(known.id_cond, usual.id_cond)


def test_an_adapter_of_ones_own(
    pulid, anna: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pulid("world", "person", "--seed", 1_000_007, "-o", anna)
    words = (
        "generate",
        "portrait, photo",
        "--id",
        anna,
        "--preset",
        "mini-lightning",
        "--steps",
        1,
        "-o",
    )
    own = ("--adapter", MINIATURE / "pulid-stage1.safetensors")
    for name, more in (("usual", ()), ("own", own)):
        done = pulid(*words, tmp_path / name, *more)
        assert done.code == 0, done.err
    again = pulid(
        "generate", "--from", tmp_path / "own" / "portrait-photo-0.png", "-o", tmp_path / "again"
    )
    assert again.code == 0, again.err
    usual, own, again = (
        Image.open(tmp_path / name / "portrait-photo-0.png").tobytes()
        for name in ("usual", "own", "again")
    )
    assert own == again != usual and not caplog.records
    missing = pulid(*words, tmp_path, "--adapter", tmp_path / "none.safetensors")
    assert plain(missing) and "none.safetensors is not there" in missing.err


def test_adapters_are_measured_by_their_files(pulid, tmp_path: Path) -> None:
    files = [MINIATURE / f"pulid-{stage}.safetensors" for stage in ("stage1", "stage3")]
    words = (
        "mini",
        "evaluate",
        "--people",
        2,
        "--prompts",
        1,
        "--preset",
        "mini-lightning",
        "--json",
    )
    done = pulid(*words, "--adapter", files[0], "--adapter", files[1])
    table = json.loads(done.out)
    base, first, third, truth = table["rows"]
    assert [row["model"] for row in table["rows"]] == ["base", *map(str, files), "truth"]
    assert (
        base["outside_face"] == 0 < first["outside_face"] != third["outside_face"]
        and truth["face_sim"] > base["face_sim"]
    )
    missing = pulid(*words, "--adapter", tmp_path / "none.safetensors")
    assert plain(missing) and "none.safetensors is not there" in missing.err


def test_all_faces_are_listed(pulid, anna: Path) -> None:
    pulid("world", "person", "--seed", 1_000_007, "-o", anna)
    done = pulid("identify", anna, "--face", "all")
    assert done.code == 0 and re.fullmatch(
        rf"{anna}: face 0 at \d+,\d+ to \d+,\d+, score [01]\.\d\d\n", done.out
    ), done.err
    assert list(anna.parent.glob("*.safetensors")) == []


def test_an_identity_of_other_models_is_refused_behind_a_mask(
    pulid, anna: Path, tmp_path: Path
) -> None:
    other = Identity(
        torch.ones(1, 1, 4), tuple(torch.ones(1, 3, 2) for _ in range(5)), {"tower": "abc"}
    )
    other.save(tmp_path / "other.safetensors")
    for mask in ((), ("--mask", anna)):
        words = (
            "--id",
            tmp_path / "other.safetensors",
            *mask,
            "--preset",
            "mini-lightning",
            "-o",
            tmp_path,
        )
        refused = pulid("generate", "portrait, photo", *words)
        assert plain(refused) and "make it again from the photo" in refused.err


def test_too_little_memory_is_one_sentence(
    pulid, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def much(amount: int) -> None:
        torch.empty(amount, dtype=torch.uint8)

    def on_an_accelerator(amount: int) -> None:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {amount} bytes.")

    for work in (much, on_an_accelerator):
        monkeypatch.setattr(cli, "_generate", lambda *_, work=work: work(2**50))
        spoken = pulid("generate", "portrait", "-o", tmp_path)
        assert plain(spoken) and "--memory 12gb" in spoken.err
    monkeypatch.setattr(cli, "_generate", lambda *_: much(-1))
    monkeypatch.setattr(sys, "argv", ["pulid", "generate", "portrait", "-o", str(tmp_path)])
    with pytest.raises(RuntimeError, match="negative dimension"):  # a fault keeps its traceback
        cli.main()


def test_weights_are_listed_and_missing_ones_named(
    pulid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parsing_bisenet.pth").write_bytes(b"weights")
    monkeypatch.setenv("COLUMNS", "300")
    listed = pulid("weights", "list", "--folder", tmp_path).out
    assert (
        str(tmp_path / "parsing_bisenet.pth") in listed
        and "not commercial" in listed
        and "pulid_v1.bin" in listed
    )
    assert "468e13ca13a9" in listed
    (tmp_path / "pulid_v1.bin").write_bytes(b"weights")
    assert pulid("weights", "verify", "pulid-v1", "--folder", tmp_path).out.startswith(
        "pulid-v1: here, and there is nothing"
    )
    damaged = pulid("weights", "verify", "parsing", "--folder", tmp_path)
    assert plain(damaged) and "is damaged" in damaged.err
    entries = [WEIGHTS[name] for name in PRESETS["flux"]().published[1:]]
    for entry in entries:
        (tmp_path / entry.name).write_bytes(b"weights")
    (tmp_path / "FLUX.1-dev").mkdir()
    (tmp_path / "FLUX.1-dev" / "model_index.json").write_text("{}")
    got = pulid(
        "weights", "get", "flux", "parsing", "--folder", tmp_path
    )  # what is here is not asked for
    assert got.code == 0 and got.out.split() == [
        str(tmp_path / name) for name in ("FLUX.1-dev", *(e.name for e in entries))
    ]
    missing = pulid("generate", "portrait", "--preset", "sdxl", "-o", tmp_path)
    assert plain(missing) and "`pulid weights get pulid-v1.1`" in missing.err
    assert {"instantid", "identitynet", "identitynet-config", "arcface", "detector"} <= set(
        stores._of_method("instantid")
    )
    assert stores._of_method("arcface") == ["arcface"] and "juggernaut" not in stores._of_method(
        "photomaker"
    )


def test_presets_are_listed_with_what_they_lack(
    pulid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    listed = pulid("presets", "list").out
    assert all(name in listed for name in PRESETS) and "`pulid weights get sdxl-v1`" in listed
    assert any("mini " in line and "yes" in line for line in listed.splitlines())
    predicted = pulid("presets", "memory", "flux", "--size", "512x512").out
    assert predicted.count("(peak)") == 4 and "text encoders" in predicted


def test_mistakes_are_one_sentence(pulid, studio: FakeStudio, anna: Path, tmp_path: Path) -> None:
    photo, broken, text = (
        tmp_path / "photo.png",
        tmp_path / "broken.png",
        tmp_path / "notes.safetensors",
    )
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
        ("identify", anna),
        ("identify", anna, "-o", out, "--face", "left"),
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
        ("generate", "portrait", "--start-step", 4, "-o", tmp_path),  # FLUX's
        ("generate", "portrait", "--true-cfg", 3, "--negative", "red", "-o", tmp_path),
        ("generate", "portrait", "--start-cfg", 3, "-o", tmp_path),
        ("generate", "portrait", "--text-tokens", 256, "-o", tmp_path),
        ("generate", "portrait", "--preset", "flux", "--num-zero", 3, "-o", tmp_path),  # SDXL's
        ("generate", "portrait", "--preset", "flux", "--projection", "ortho", "-o", tmp_path),
        ("generate", "portrait", "--preset", "flux", "--method", "style", "-o", tmp_path),
        (
            "generate",
            "portrait",
            "--preset",
            "sdxl",
            "--method",
            "instantid",
            "--num-zero",
            3,
            "-o",
            tmp_path,
        ),  # PuLID's
        ("generate", "portrait", "--control-scale", 0.5, "-o", tmp_path),  # of nothing
        ("weights", "get", "everything"),
        ("generate", "portrait", "--device", "meta:7x"),
    ):
        spoken = pulid(*words)
        assert plain(spoken), (words, spoken)


def test_an_image_is_made_again_as_it_was_and_not_otherwise(
    pulid, studio: FakeStudio, tmp_path: Path
) -> None:
    assert pulid("generate", "portrait", "-o", tmp_path).code == 0
    again = ("generate", "--from", tmp_path / "portrait-0.png", "-o", tmp_path)
    assert pulid(*again, "--device", "cpu").code == 0
    for others in (("a person",), ("--steps", 5), ("--num", 2), ("--scale", 0.8, "--seed", 0)):
        spoken = pulid(*again, *others)
        assert plain(spoken) and others[0].replace("a person", "prompt") in spoken.err


def test_no_command_and_bad_options_show_the_usage(pulid) -> None:
    assert "Usage" in pulid().out
    assert pulid("generate", "x", "--num", "0").code == 2
    assert pulid("generate", "x", "--seed", "-1").code == 2
