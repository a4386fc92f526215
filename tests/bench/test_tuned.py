"""Methods that are tuned on each subject of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openpulid.bench.configuration import describe_configuration
from openpulid.bench.generate import Worker, generate_run, local_executor
from openpulid.bench.methods import Presets, check_weights, load_studios, select_presets
from openpulid.bench.run_dir import BASE, RunDir
from openpulid.bench.suite import load_suite
from openpulid.bench.table import ResultTable
from openpulid.bench.tuned import SubjectTuner, TunedPreset
from openpulid.errors import OptionError
from openpulid.methods.tuned.textual_inversion import TextualInversion
from openpulid.mini.evaluation.subjects import synthetic_subjects

METHOD = "textual-inversion"
SUITE = load_suite("quick")
SUITE = replace(SUITE, prompts=SUITE.prompts[:1], seeds=SUITE.seeds[:1])
SUBJECTS = synthetic_subjects(2, SUITE.first_person)


def select(**changes: object) -> Presets:
    presets = select_presets(SUITE, [METHOD, "pulid"])
    tuned = presets[METHOD]
    assert isinstance(tuned, TunedPreset)
    recipe = replace(tuned.recipe, **{"steps": 2, "batch": 1, **changes})
    return {**presets, METHOD: replace(tuned, recipe=recipe)}


def generate(run_dir: RunDir, presets: Presets) -> None:
    worker = Worker(SUITE, load_studios(SUITE, presets, "cpu"), SUBJECTS, run_dir)
    generate_run(SUITE, presets, SUBJECTS, run_dir, local_executor(worker))


def test_method_is_tuned_once_per_subject(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    generate(run_dir, select())
    files = sorted(run_dir.tuned_path(METHOD).rglob("*.safetensors"))
    assert [file.stem for file in files] == [subject.name for subject in SUBJECTS]
    vectors = [TextualInversion.load(file).vectors["clip_l"] for file in files]
    assert not vectors[0].equal(vectors[1])
    run = run_dir.load()
    records = [run.records[key] for key in run.keys(METHOD)]
    assert all(record.is_done for record in records), [record.error for record in records]
    assert [record.identity_bytes for record in records] == [file.stat().st_size for file in files]
    assert all((record.identify_seconds or 0) > 0 for record in records)

    rows = {row["method"]: row for row in ResultTable(run).to_json()["rows"]}
    assert "person_kb" not in rows[BASE] and rows[METHOD]["person_seconds"] > 0
    assert rows[METHOD]["person_kb"] == pytest.approx(
        sum(file.stat().st_size for file in files) / 2000, rel=1e-4
    )
    assert rows["pulid"]["person_kb"] > 100  # five levels of the vision encoder
    assert "person_kb ↓" in ResultTable(run).overview().header

    changed = {file: file.stat().st_mtime_ns for file in files}
    run_dir.image_path(run.keys(METHOD)[0]).unlink()
    generate(run_dir, select())  # the image again, with the same file
    assert {file: file.stat().st_mtime_ns for file in files} == changed
    assert run_dir.image_path(run.keys(METHOD)[0]).is_file()


def test_subjects_and_methods_share_a_pipeline(tmp_path: Path) -> None:
    """The files are those of tunings with pipelines of their own."""
    presets = select_presets(SUITE, ["dreambooth", METHOD])
    shared = SubjectTuner(torch.device("cpu"))
    pipes = []
    for name, subject in (("dreambooth", SUBJECTS[0]), (METHOD, SUBJECTS[1])):
        preset = presets[name]
        assert isinstance(preset, TunedPreset)
        recipe = replace(preset.recipe, steps=2, batch=1, num_class_images=1)
        preset = replace(preset, recipe=recipe)
        configuration = describe_configuration(name, preset, SUITE.options)
        files = []
        for index, tuner in enumerate((shared, SubjectTuner(torch.device("cpu")))):
            tuned, _, _ = tuner.tune(preset, subject, tmp_path / str(index) / name, configuration)
            files.append(load_file(tuned.models.require_adapter()))
        pipes.append(shared._pipe)
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert pipes[0] is pipes[1]


def test_scales_share_a_file(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    tuned = select()[METHOD]
    half = {**select(), f"{METHOD}@0.5": tuned.with_defaults(start=0.5)}
    generate(run_dir, {name: half[name] for name in (BASE, METHOD, f"{METHOD}@0.5")})
    assert len(list(run_dir.tuned_path(METHOD).rglob("*.safetensors"))) == len(SUBJECTS)


def test_another_recipe_tunes_again() -> None:
    presets, changed = select(), select(lr=1e-4)
    options = SUITE.options
    plain = describe_configuration(METHOD, presets[METHOD], options)
    assert plain["recipe"]["steps"] == 2
    assert plain == describe_configuration(METHOD, select()[METHOD], options)
    assert plain != describe_configuration(METHOD, changed[METHOD], options)


def test_tuning_methods_need_no_file() -> None:
    names = ["lora", "dreambooth-lora", "lora@0.5"]
    presets = select_presets(SUITE, names)
    check_weights(presets)
    assert list(presets) == [BASE, *names]
    recipes = [preset.recipe for preset in presets.values() if isinstance(preset, TunedPreset)]
    assert [recipe.num_class_images for recipe in recipes] == [0, 64, 0]
    assert presets["lora@0.5"].defaults.identity.scale == 0.5
    with pytest.raises(OptionError, match=r"mine\.safetensors shows one person; name lora"):
        select_presets(SUITE, ["lora:mine.safetensors"])
