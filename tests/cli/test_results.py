"""Files that the commands write: nothing that exists is replaced, nothing that is done is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from openpulid.cli.options import print_path, print_status
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import sha256
from openpulid.pipelines.file_names import image_name
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_fields import MAX_IMAGES
from tests.cli.conftest import FakeStudio, Run


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_run_keeps_its_image(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    runs: list[tuple[object, ...]] = [
        (),
        ("--id", anna),
        ("--id", anna, "--scale", 0.3),
        ("--id", anna, "--start", 0.5),
        ("--negative", "smiling"),
        ("--no-metadata",),
    ]
    written: dict[str, bytes] = {}
    for number, options in enumerate(runs, 1):
        done = pulid("generate", "a portrait", *options, "-o", out)
        assert done.code == 0, done.err
        written[Path(done.out.strip()).name] = Path(done.out.strip()).read_bytes()
        assert len(written) == number and read_all(out) == dict(sorted(written.items()))
    assert list(written)[:3] == ["a-portrait-0.png", "a-portrait-0-2.png", "a-portrait-0-3.png"]
    # the same run again has nothing new to write
    again = pulid("generate", "a portrait", *runs[2], "-o", out)
    assert again.out.strip() == str(out / "a-portrait-0-3.png")
    assert read_all(out) == dict(sorted(written.items()))


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("Ein Foto, schön", "ein-foto-schön-0.png"),
        ("肖像画", "肖像画-0.png"),
        ("портрет (1.2)", "портрет-1-2-0.png"),
        ("../../etc/passwd\n", "etc-passwd-0.png"),
        ("!?", "image-0.png"),
        ("x" * 500, "x" * 48 + "-0.png"),
    ],
)
def test_names_of_prompts_in_any_script(prompt: str, name: str) -> None:
    assert image_name(GenerationRequest(prompt=prompt)) == name


@pytest.mark.parametrize(
    ("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(128 + signal.SIGTERM), 143)]
)
def test_stopped_run_keeps_what_is_done(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, stop: BaseException, code: int
) -> None:
    studio.stop, studio.stop_at = stop, 3
    done = pulid(
        "generate", "portrait", "--id", anna, "--face", 0, "--num", 4, "-o", tmp_path / "o"
    )
    names = [f"portrait-{seed}.png" for seed in range(3)]
    assert done.code == code and sorted(read_all(tmp_path / "o")) == names
    assert done.out.splitlines() == [str(tmp_path / "o" / name) for name in names]
    assert done.err == "pulid: stopped; 3 of 4 images are written.\n"


def test_sigterm_ends_a_command_like_ctrl_c(
    pulid: Run, studio: FakeStudio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = []

    def wait(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            cleaned.append(True)

    monkeypatch.setattr("openpulid.cli.generate.run_request", wait)
    assert pulid("generate", "portrait", "-o", tmp_path).code == 143
    assert cleaned and signal.getsignal(signal.SIGTERM) == before


def test_failed_image_keeps_the_others(pulid: Run, studio: FakeStudio, tmp_path: Path) -> None:
    studio.stop, studio.stop_at = RuntimeError("CUDA out of memory."), 1
    done = pulid("generate", "portrait", "--num", 2, "-o", tmp_path)
    assert done.code == 2 and "too little memory" in done.err
    assert list(read_all(tmp_path)) == ["portrait-0.png"]


def test_number_of_images_has_a_maximum(pulid: Run, studio: FakeStudio, tmp_path: Path) -> None:
    refused = pulid("generate", "portrait", "--num", 10**9, "-o", tmp_path)
    assert refused.is_one_sentence
    assert refused.err == f"pulid: --num must be at most {MAX_IMAGES}, got {10**9}.\n"
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_none_are_one_sentence(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    refused = pulid("generate", "portrait", "--size", f"{'9' * 5000}x9", "-o", tmp_path)
    assert refused.is_one_sentence and "expected WIDTHxHEIGHT" in refused.err
    for face in ("²", "9" * 5000):
        refused = pulid("identify", anna, "-o", tmp_path / "a.safetensors", "--face", face)
        assert refused.is_one_sentence and "--face must be a number" in refused.err


def test_full_disk_is_one_sentence(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    refused = pulid("generate", "portrait", "--id", anna, "--face", 0, "-o", tmp_path / "o")
    assert refused.is_one_sentence and "(No space left on device); free some disk" in refused.err
    assert list((tmp_path / "o").iterdir()) == []


def test_image_has_names_without_folders(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    files = ("--id", anna, "--mask", anna)
    done = pulid("generate", "portrait", *files, "-o", tmp_path / "o")
    content = Path(done.out.strip()).read_bytes()
    for secret in (str(tmp_path), tmp_path.name, sha256(anna)[:8]):
        assert secret.encode() not in content
    assert b"anna.png" in content
    bare = pulid("generate", "portrait", *files, "--no-metadata", "-o", tmp_path / "bare")
    assert b"anna" not in Path(bare.out.strip()).read_bytes()
    assert Image.open(bare.out.strip()).info.keys() == {"xmp", "XML:com.adobe.xmp"}


def test_name_that_is_not_utf8(pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path) -> None:
    person = Path(os.fsdecode(os.fsencode(tmp_path) + b"/ann\xe9.png"))
    person.write_bytes(anna.read_bytes())
    out = tmp_path / "o"
    done = pulid("generate", "portrait", "--id", person, "--mask", person, "-o", out)
    assert done.code == 0, done.err
    image = out / "portrait-0.png"
    assert Provenance.read(image).request.people[0].images == (r"ann\xe9.png",)
    again = ("generate", "--from", image, "-o", tmp_path / "again")
    assert pulid(*again, "--id", person, "--mask", person).code == 0
    refused = pulid(*again)
    assert refused.is_one_sentence and r"generated with ann\xe9.png and ann\xe9.png" in refused.err
    done = pulid("identify", person, "-o", out / "anna.safetensors")
    assert done.code == 0 and (out / "anna.safetensors").is_file(), done.err


def test_names_cannot_change_the_terminal(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    name = "a\x1b[2J\nb\u202e.png"
    person = tmp_path / name
    person.write_bytes(anna.read_bytes())
    shown = r"a\x1b[2J\nb\u202e.png"
    done = pulid("generate", "portrait", "--id", person, "-o", tmp_path)  # warns of two faces
    assert done.code == 0 and shown in done.err and name not in done.err
    listed = pulid("identify", person, "--face", "all")
    assert shown in listed.out and name not in listed.out
    refused = pulid("generate", "portrait", "--id", f"{person}x", "-o", tmp_path)
    assert refused.is_one_sentence and shown in refused.err


def test_output_is_never_an_input(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    content = anna.read_bytes()
    link = tmp_path / "link.png"
    link.symlink_to(anna)
    hard_link = tmp_path / "hard.png"
    hard_link.hardlink_to(anna)
    for show in (anna, link, hard_link, tmp_path / "." / "anna.png"):
        options = ("-o", tmp_path / "anna.safetensors", "--show", show, "--overwrite")
        refused = pulid("identify", anna, *options)
        assert refused.is_one_sentence and "is the same file as the input" in refused.err
    assert anna.read_bytes() == content and not (tmp_path / "anna.safetensors").exists()


def test_existing_output_is_kept(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
    photo = tmp_path / "holiday.png"
    Image.new("RGB", (64, 64), "green").save(photo)
    weights = tmp_path / "adapter.safetensors"
    weights.write_bytes(b"weights")
    other = tmp_path / "ben.safetensors"
    assert pulid("identify", anna, "-o", other).code == 0
    before = read_all(tmp_path)
    for options in (
        ("-o", tmp_path / "new.safetensors", "--show", photo, "--face", 0),
        ("-o", weights, "--show", tmp_path / "new.png", "--face", 0),
        ("-o", other, "--face", 1),
    ):
        refused = pulid("identify", anna, *options)
        assert refused.is_one_sentence
        assert "exists already; choose another name, or replace it with --overwrite" in refused.err
    for command in (
        ("world", "person", "--seed", 7),
        ("world", "sheet", "--seed", 7),
        ("mini", "sweep"),
        ("bench", "train"),
        ("bench", "speed"),
        ("bench", "identify"),
    ):
        refused = pulid(*command, "-o", photo)
        assert refused.is_one_sentence and "exists already" in refused.err
    assert read_all(tmp_path) == before
    done = pulid("identify", anna, "-o", other, "--face", 1, "--show", photo, "--overwrite")
    assert done.code == 0 and float(Identity.load(other).id_cond[0, 0, 0]) == 1
    # the same result again is no other content
    before = read_all(tmp_path)
    assert pulid("identify", anna, "-o", other, "--face", 1, "--show", photo).code == 0
    assert read_all(tmp_path) == before


def test_status_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_status("runs/[/red] [bold]\x1b[2J" + "x" * 200)
    assert capsys.readouterr().err == r"runs/[/red] [bold]\x1b[2J" + "x" * 200 + "\n"


def test_path_is_printed_as_it_is(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    print_path(Path(os.fsdecode(b"o\xff/\xc3\xa9.png")))
    assert capsysbinary.readouterr().out == b"o\xff/\xc3\xa9.png\n"
