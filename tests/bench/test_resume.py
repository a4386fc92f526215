"""What a start of a run finds of the one before: images that are made again, files that were not finished."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from openpulid.bench import generate as run
from openpulid.bench import score as judging
from openpulid.bench.run_dir import BASE, WEIGHTS, Job, RunDir
from openpulid.bench.suite import find_suite
from openpulid.cli.bench import _contest, _presets
from openpulid.errors import OptionError
from openpulid.mini.evaluation.subjects import synthetic_subjects
from openpulid.pipelines.presets import Preset

SUITE = find_suite("quick")
PEOPLE = synthetic_subjects(1, SUITE.first)
PRESETS = _presets(SUITE, ["pulid"])
METHODS = list(PRESETS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = RunDir(tmp_path_factory.mktemp("run"))
    run.run(
        SUITE, PRESETS, PEOPLE, folder, run.here(_contest(SUITE, PRESETS, PEOPLE, folder, "cpu"))
    )
    return folder


def test_a_portrait_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = io.BytesIO(), RunDir(tmp_path)
    PEOPLE[0].portrait.save(whole, "png")

    def stopped(picture: Image.Image, place: Path) -> None:
        Path(place).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image.Image, "save", stopped)
        folder.begin(SUITE, METHODS, PEOPLE)
    folder.begin(SUITE, METHODS, PEOPLE)
    kept = Image.open(tmp_path / "people" / f"{PEOPLE[0].name}.png").convert("RGB")
    assert kept.tobytes() == PEOPLE[0].portrait.convert("RGB").tobytes()


def copied(place: Path, preset: Preset) -> dict[str, Path]:
    """What a preset names of these, copied."""
    copies = {}
    for part in ("pipeline", "unet", "recognition", "vision_encoder"):
        original, copies[part] = Path(getattr(preset.models, part)), place / part
        (shutil.copytree if original.is_dir() else shutil.copy)(original, copies[part])
    return copies


def changed(place: Path) -> Callable[[], object]:
    """Changes one tensor of a file, or of the last one in a folder; what is returned undoes it."""
    file = sorted(place.rglob("*.safetensors"))[-1] if place.is_dir() else place
    before, tensors = file.read_bytes(), load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    save_file(tensors | {name: tensors[name] + 1}, file)
    return lambda: file.write_bytes(before)


def test_every_file_of_a_folder_counts(tmp_path: Path) -> None:
    """Also one that is no safetensors, and what lies beside a method's file."""
    instantid = _presets(SUITE, ["instantid"])["instantid"]
    shutil.copytree(instantid.models.adapter, tmp_path / "instantid")
    weights = tmp_path / "instantid" / "ip-adapter.safetensors"
    file = weights.rename(weights.with_suffix(".bin"))
    for adapter in (file.parent, file):
        own = instantid.with_models(adapter=adapter)
        for part in (file, file.parent / "ControlNetModel" / "diffusion_pytorch_model.safetensors"):
            before = run.configuration("instantid", own, SUITE.options)
            assert before == run.configuration("instantid", own, SUITE.options)
            part.write_bytes(part.read_bytes() + b" ")
            assert before != run.configuration("instantid", own, SUITE.options), (adapter, part)


def test_what_was_made_otherwise_is_made_again(made: RunDir, tmp_path: Path) -> None:
    """Another file, another scale: an old image is no image of them."""
    shutil.copytree(made.path, tmp_path / "run")
    folder, asked = RunDir(tmp_path / "run"), []

    def spread(chunks: Iterable[Job]) -> Iterable[Job]:
        asked.extend(chunks)
        return ()

    run.run(SUITE, PRESETS, PEOPLE, folder, spread)
    assert asked == []
    stage1 = PRESETS["pulid"].models.adapter.with_name("pulid-stage1.safetensors")
    for other in (
        PRESETS["pulid"].with_defaults(scale=0.5),
        PRESETS["pulid"].with_models(adapter=stage1),
    ):
        asked.clear()
        run.run(SUITE, {**PRESETS, "pulid": other}, PEOPLE, folder, spread)
        assert {cell.method for chunk in asked for cell in chunk.cells} == {"pulid"} and len(
            asked
        ) == 2

    def again(**changes: Path | None) -> set[str]:
        asked.clear()
        presets = {method: preset.with_models(**changes) for method, preset in PRESETS.items()}
        run.run(SUITE, presets, PEOPLE, folder, spread)
        return {cell.method for chunk in asked for cell in chunk.cells}

    copies = copied(tmp_path, PRESETS[BASE])
    assert again(**copies) == set()  # the same weights elsewhere
    for part, methods in {
        "pipeline": set(METHODS),
        "unet": set(METHODS),
        "recognition": {"pulid"},
        "vision_encoder": {"pulid"},
    }.items():
        undo = changed(copies[part])
        assert again(**copies) == methods, part
        undo()
    assert again(unet=None) == set(METHODS) and again() == set()
    changed(copies["unet"])
    for method in METHODS:
        for cell in judging.sample_keys(folder.facts(), method):  # as an older version wrote it
            record = folder.record(cell) or {}
            known = {
                name: value for name, value in record["configuration"].items() if name != WEIGHTS
            }
            folder.keep(cell, {**record, "configuration": known})
    assert again(**copies) == set()
    with pytest.raises(OptionError, match="another picture"):
        folder.begin(
            SUITE,
            METHODS,
            [replace(PEOPLE[0], portrait=synthetic_subjects(2, SUITE.first)[1].portrait)],
        )
