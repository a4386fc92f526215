"""Tests of restarted runs: images with another configuration, and files that were not finished."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from openpulid.bench.configuration import describe_configuration
from openpulid.bench.generate import Worker, generate_run, local_executor
from openpulid.bench.methods import load_studios, select_presets
from openpulid.bench.run_dir import BASE, Job, RunDir
from openpulid.bench.suite import load_suite
from openpulid.errors import OptionError
from openpulid.mini.evaluation.subjects import synthetic_subjects
from openpulid.pipelines.presets import Preset

SUITE = load_suite("quick")
SUBJECTS = synthetic_subjects(1, SUITE.first_person)
PRESETS = select_presets(SUITE, ["pulid"])
METHODS = list(PRESETS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run_dir = RunDir(tmp_path_factory.mktemp("run"))
    worker = Worker(SUITE, load_studios(SUITE, PRESETS, "cpu"), SUBJECTS, run_dir)
    generate_run(SUITE, PRESETS, SUBJECTS, run_dir, local_executor(worker))
    return run_dir


def test_interrupted_portrait_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)

    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.fsync", interrupt)
        run_dir.create(SUITE, METHODS, SUBJECTS)
    assert list((tmp_path / "people").iterdir()) == []
    run_dir.create(SUITE, METHODS, SUBJECTS)
    portrait = Image.open(tmp_path / "people" / f"{SUBJECTS[0].name}.png").convert("RGB")
    assert portrait.tobytes() == SUBJECTS[0].portrait.convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("record", "no JSON"),
        ("record", "[" * 100_000),
        ("record", '{"sample": 3}'),
        ("record", "{}"),
        ("suite", '{"suite": {}, "people": "anna", "methods": []}'),
        ("suite", "3"),
        ("method_metrics", '{"pulid": {"fid": "low"}}'),
        ("method_metrics", '{"pulid": {"fid": NaN}}'),
    ],
)
def test_damaged_file_is_named(finished: RunDir, tmp_path: Path, name: str, text: str) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    path = tmp_path / "run" / f"{name}.json"
    if name == "record":
        path = sorted((tmp_path / "run" / "samples").rglob("*.json"))[0]
    path.write_text(text)
    with pytest.raises(OptionError, match=rf"^{path} is not valid \(.*\); ") as error:
        RunDir(tmp_path / "run").load()
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_report_of_another_origin_is_kept(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("my report")
    with pytest.raises(OptionError, match=r"contains no run, but a file report\.md"):
        RunDir(tmp_path).create(SUITE, METHODS, SUBJECTS)
    assert (tmp_path / "report.md").read_text() == "my report"
    assert not (tmp_path / "suite.json").exists()


def test_record_of_another_image_is_refused(finished: RunDir, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    first, second = sorted((tmp_path / "run" / "samples" / "base").glob("*.json"))[:2]
    shutil.copyfile(second, first)
    with pytest.raises(OptionError, match="is the record of another image"):
        RunDir(tmp_path / "run").load()


def copy_parts(folder: Path, preset: Preset) -> dict[str, Path]:
    """Copy some of a preset's weights; return the copies by the names of the preset's fields."""
    copies = {}
    for part in ("pipeline", "unet", "recognition", "vision_encoder"):
        original, copies[part] = Path(getattr(preset.models, part)), folder / part
        (shutil.copytree if original.is_dir() else shutil.copy)(original, copies[part])
    return copies


def change_tensor(path: Path) -> Callable[[], object]:
    """Change one tensor of a file, or of the last file in a folder; return the undo function."""
    file = sorted(path.rglob("*.safetensors"))[-1] if path.is_dir() else path
    original, tensors = file.read_bytes(), load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file(tensors | {name: tensors[name] + 1}, file)
    return lambda: file.write_bytes(original)


def test_configuration_covers_every_file_of_a_method(tmp_path: Path) -> None:
    """Also files that are not safetensors, and the folder next to a method's file."""
    instantid = select_presets(SUITE, ["instantid"])["instantid"]
    shutil.copytree(instantid.models.adapter, tmp_path / "instantid")
    weights = tmp_path / "instantid" / "ip-adapter.safetensors"
    file = weights.rename(weights.with_suffix(".bin"))
    for adapter in (file.parent, file):
        preset = instantid.with_models(adapter=adapter)
        for part in (file, file.parent / "ControlNetModel" / "diffusion_pytorch_model.safetensors"):
            original = describe_configuration("instantid", preset, SUITE.options)
            assert original == describe_configuration("instantid", preset, SUITE.options)
            part.write_bytes(part.read_bytes() + b" ")
            assert original != describe_configuration("instantid", preset, SUITE.options), part


def test_changed_configuration_is_generated_again(finished: RunDir, tmp_path: Path) -> None:
    """An image of another file or scale is not reused."""
    shutil.copytree(finished.path, tmp_path / "run")
    run_dir = RunDir(tmp_path / "run")
    jobs: list[Job] = []

    def collect(missing: Iterable[Job]) -> Iterable[Job]:
        jobs.extend(missing)
        return ()

    generate_run(SUITE, PRESETS, SUBJECTS, run_dir, collect)
    assert jobs == []
    stage1 = PRESETS["pulid"].models.adapter.with_name("pulid-stage1.safetensors")
    for changed in (
        PRESETS["pulid"].with_defaults(scale=0.5),
        PRESETS["pulid"].with_models(adapter=stage1),
    ):
        jobs.clear()
        generate_run(SUITE, {**PRESETS, "pulid": changed}, SUBJECTS, run_dir, collect)
        assert {key.method for job in jobs for key in job.keys} == {"pulid"} and len(jobs) == 2

    def missing_methods(**changes: Path | None) -> set[str]:
        jobs.clear()
        presets = {method: preset.with_models(**changes) for method, preset in PRESETS.items()}
        generate_run(SUITE, presets, SUBJECTS, run_dir, collect)
        return {key.method for job in jobs for key in job.keys}

    copies: dict[str, Any] = copy_parts(tmp_path, PRESETS[BASE])
    assert missing_methods(**copies) == set()  # the same weights at another path
    for part, methods in {
        "pipeline": set(METHODS),
        "unet": set(METHODS),
        "recognition": {"pulid"},
        "vision_encoder": {"pulid"},
    }.items():
        undo = change_tensor(copies[part])
        assert missing_methods(**copies) == methods, part
        undo()
    assert missing_methods(unet=None) == set(METHODS) and missing_methods() == set()


def test_changed_portrait_is_rejected(finished: RunDir, tmp_path: Path) -> None:
    shutil.copytree(finished.path, tmp_path / "run")
    second = synthetic_subjects(2, SUITE.first_person)[1]
    with pytest.raises(OptionError, match="differs from the image"):
        RunDir(tmp_path / "run").create(
            SUITE, METHODS, [replace(SUBJECTS[0], portrait=second.portrait)]
        )
