"""The command line: what it writes, and one plain sentence for every error of the user."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from openpulid import __version__
from openpulid.cli import weights
from openpulid.cli.options import print_progress, print_table
from openpulid.io.hub import WEIGHTS
from openpulid.pipelines.presets import MINIATURE, PRESETS
from tests.cli.conftest import FakeStudio, Run


def test_person_is_reproducible(pulid: Run, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert (
            pulid("world", "person", "--seed", 1_000_007, "-o", tmp_path / "new" / name).code == 0
        )
    one, two = ((tmp_path / "new" / name).read_bytes() for name in ("a.png", "b.png"))
    assert one == two
    assert Image.open(tmp_path / "new" / "a.png").size == (96, 96)


def test_sheet_has_eight_rows_and_columns(pulid: Run, tmp_path: Path) -> None:
    assert pulid("world", "sheet", "-o", tmp_path / "s.png", "--size", 32).code == 0
    assert Image.open(tmp_path / "s.png").size == (8 * 34 - 2, 8 * 34 - 2)


def test_words_lists_the_vocabulary(pulid: Run) -> None:
    done = pulid("world", "words")
    assert "hat: none, beanie, brimmed" in done.out and " portrait " in done.out


def test_evaluate_compares_adapter_files(pulid: Run, tmp_path: Path) -> None:
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
    assert missing.is_one_sentence and "none.safetensors does not exist" in missing.err


def test_weights_are_listed_and_missing_ones_named(
    pulid: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        "pulid-v1: installed, but no hash is known"
    )
    damaged = pulid("weights", "verify", "parsing", "--folder", tmp_path)
    assert damaged.is_one_sentence and "is damaged" in damaged.err
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
    assert missing.is_one_sentence and "`pulid weights get sdxl`" in missing.err
    assert all(f"{name} (" in missing.err for name in PRESETS["sdxl"]().published)
    assert {"instantid", "identitynet", "identitynet-config", "arcface", "detector"} <= set(
        weights.method_weights("instantid")
    )
    infiniteyou = ["infiniteyou-sim", "detector", "arcface-loss", "infusenet-sim"]
    assert weights.expand_names(["infiniteyou-sim"]) == infiniteyou
    assert weights.expand_names(["arcface"]) == ["arcface"]
    assert "juggernaut" not in weights.method_weights("photomaker")


def test_presets_are_listed_with_missing_weights(
    pulid: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    listed = pulid("presets", "list").out
    assert all(name in listed for name in PRESETS) and "`pulid weights get sdxl-v1`" in listed
    assert any(line.startswith("mini\t") and "yes" in line for line in listed.splitlines())
    predicted = pulid("presets", "memory", "flux", "--size", "512x512").out
    assert predicted.count("(peak)") == 4 and "text encoders" in predicted
    both = pulid("presets", "memory", "--controls", 1).out
    assert both.count("(peak)") == 8 and both.count("ControlNets") == 2 * 4 * 3
    assert all(f"sdxl\t{level}" in both for level in ("full", "12gb", "8gb", "6gb"))
    words = ("presets", "memory", "flux", "--size", "512x512", "--method", "infiniteyou")
    assert pulid(*words).out.count("adapter 5.7") == 3  # InfuseNet in each phase of `full`


def test_user_errors_are_one_sentence(
    pulid: Run, studio: FakeStudio, anna: Path, tmp_path: Path
) -> None:
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
        ("presets", "memory", "mini"),
        ("presets", "memory", "sdxl", "--method", "ip-adapter"),
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
        ("generate", "portrait", "--device", "meta"),  # computes nothing
    ):
        done = pulid(*words)
        assert done.is_one_sentence, (words, done)


def test_options_that_a_recipe_does_not_use_are_refused(pulid: Run, tmp_path: Path) -> None:
    done = pulid("train", "mini_stage1", "--data", tmp_path, "--base", "sdxl-base")
    assert done.is_one_sentence and "leave out --data, --base." in done.err
    assert pulid("train", "mini_stage1", "--minutes", "nan").code == 2


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_any_file_name_is_printed(tmp_path: Path, encoding: str) -> None:
    """The name is not UTF-8, or not in the encoding of the terminal."""
    out = tmp_path / "ann\udce9-\u00e4.png"
    command = "from openpulid.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "world", "person", "--seed", "1", "-o", os.fsencode(out)],
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert out.is_file() and done.stdout.strip()
    if encoding == "utf-8":
        assert done.stdout.strip() == os.fsencode(out)


def test_bad_usage_shows_the_usage(pulid: Run) -> None:
    assert "Usage" in pulid().out
    assert pulid("generate", "x", "--num", "0").code == 2
    assert pulid("generate", "x", "--seed", "-2").code == 2


def test_version_and_short_help(pulid: Run) -> None:
    assert pulid("--version").out == f"pulid {__version__}\n"
    for words in (("-h",), ("generate", "-h"), ("weights", "get", "-h")):
        done = pulid(*words)
        assert done.code == 0 and "Usage" in done.out


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("generate", "x", "--preset", "minii"), "mini"),
        (("generate", "x", "--method", "instantID"), "instantid"),
        (("generate", "x", "--method", "fidelty"), "fidelity"),
        (("generate", "x", "--preset", "flux", "--memory", "16g"), "16gb"),
        (("generate", "x", "--projection", "ortho-v2"), "ortho_v2"),
        (("generate", "x", "--id", "a.png", "--order", "left_right"), "left-right"),
        (
            ("generate", "portrait", "--control", "control-edge", "--control-image", "ANNA"),
            "control-edges",
        ),
        (("generate", "x", "--device", "cdua"), "cuda"),
        (("identify", "ANNA", "--face", "all", "--preset", "sdlx"), "sdxl"),
        (("weights", "get", "sdxll"), "sdxl"),
        (("weights", "verify", "arcfase"), "arcface"),
        (("train", "mini_stage_1"), "mini_stage1"),
        (("mini", "build", "wrld"), "world"),
        (("bench", "run", "minature", "-o", "run"), "miniature"),
        (("web", "--preset", "mini_lightning"), "mini-lightning"),
    ],
)
def test_misspelled_names_are_corrected(
    pulid: Run, anna: Path, words: tuple[str, ...], name: str
) -> None:
    done = pulid(*[str(anna) if word == "ANNA" else word for word in words])
    assert done.is_one_sentence and f"(did you mean '{name}'?)" in done.err, done


@pytest.mark.parametrize("option", [(), ("--seed", 3)])
def test_unquoted_prompt_is_refused(pulid: Run, option: tuple[Any, ...]) -> None:
    done = pulid("generate", "portrait", "of", *option, "a", "person")
    assert done.is_one_sentence
    assert done.err == 'pulid: quote the prompt: pulid generate "portrait of a person".\n'


def test_final_punctuation_is_no_error(pulid: Run, studio: FakeStudio, tmp_path: Path) -> None:
    assert pulid("generate", "Film Noir!", "-o", tmp_path).code == 0


@pytest.mark.parametrize("seed", [-1, "-1"])
def test_seed_of_minus_one_is_random(
    pulid: Run, studio: FakeStudio, tmp_path: Path, seed: Any
) -> None:
    for _ in range(4):
        assert pulid("generate", "portrait", "--seed", seed, "-o", tmp_path).code == 0
    assert len({request.seed for request in studio.requests}) > 1


@pytest.mark.parametrize(
    "words",
    [
        ("world", "person", "--seed", 2**63),
        ("world", "sheet", "--seed", 10**23),
        ("mini", "ablation", "--people-seed", 2**64),
    ],
)
def test_seeds_of_people_have_a_maximum(pulid: Run, tmp_path: Path, words: tuple[Any, ...]) -> None:
    assert pulid(*words, "-o", tmp_path / "a.png").code == 2
    assert not list(tmp_path.iterdir())


def test_output_of_the_ablation_is_checked_before_it_is_drawn(
    pulid: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "openpulid.mini.evaluation.stage_sheet.draw_stages", lambda *args, **_: pytest.fail("drawn")
    )
    (tmp_path / "old.png").write_bytes(b"")
    for name, message in (("sheet", ".png"), ("sheet.gif", ".png"), ("old.png", "--overwrite")):
        refused = pulid("mini", "ablation", "-o", tmp_path / name)
        assert refused.is_one_sentence and message in refused.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("serve", "--worker", "gpu_0"), "letters, digits, dots and dashes"),
        (("serve", "--keep-hours", "inf"), "--keep-hours"),
        (("serve", "--keep-hours", "nan"), "--keep-hours"),
        (("serve", "--keep-identity-days", 1e9), "--keep-identity-days"),
        (("web", "--port", 0), "--port"),
    ],
)
def test_bad_option_of_a_server_is_one_sentence(
    pulid: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: tuple[Any, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = pulid(*words)
    assert refused.code == 2 and message in refused.err and "Traceback" not in refused.err


def test_missing_extra_is_named(pulid: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openpulid.errors.find_spec", lambda name: None)
    refused = pulid("serve")
    assert refused.is_one_sentence and "pip install 'openpulid[service]'" in refused.err


def test_largest_person_is_drawn(pulid: Run, tmp_path: Path) -> None:
    seed = ("--seed", 2**63 - 1)
    assert pulid("world", "person", *seed, "-o", tmp_path / "a.png").code == 0
    assert pulid("world", "sheet", *seed, "--size", 32, "-o", tmp_path / "b.png").code == 0


def test_lists_are_lines_with_tabs_in_a_pipe(
    pulid: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = [line.split("\t") for line in pulid("weights", "list").out.splitlines()]
    assert [line[0] for line in lines] == ["name", *WEIGHTS]
    assert {len(line) for line in lines} == {6}
    lines = [line.split("\t") for line in pulid("presets", "list").out.splitlines()]
    assert [line[0] for line in lines] == ["preset", *PRESETS]


def test_names_are_never_cut_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    rows = [("a-name-of-thirty-characters-[x]", "word " * 20, "0123456789" * 9)]
    print_table(("name", "text", "path"), rows)
    printed = capsys.readouterr().out
    assert rows[0][0] in printed and printed.count("word") == 20
    assert (
        "".join(line.split("\u2502")[-2].strip() for line in printed.splitlines()[3:-1])
        == (rows[0][2])
    )


def test_progress_has_lines_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    for done in (1, 2, 3):
        print_progress(done, 3)
    assert capsys.readouterr().err == "1/3\n2/3\n3/3\n"


def test_missing_folders_are_reported_before_weights(pulid: Run, tmp_path: Path) -> None:
    """Weights of gigabytes are not asked for before what costs nothing is right."""
    training = pulid("train", "sdxl_stage1", "--data", tmp_path / "none", "-o", tmp_path / "run")
    assert training.is_one_sentence and "none is not a folder" in training.err
    benchmark = pulid("bench", "run", "pulid-paper", "-o", tmp_path / "bench")
    assert benchmark.is_one_sentence and "photos with --people" in benchmark.err
    people = ("--people", tmp_path / "none")
    benchmark = pulid("bench", "run", "pulid-paper", *people, "-o", tmp_path / "bench")
    assert benchmark.is_one_sentence and "weights get" not in benchmark.err
    assert not list(tmp_path.iterdir())
