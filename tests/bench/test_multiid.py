"""MultiID-Bench: its list, and a run in which every person has a prompt of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageChops

from openpulid.bench.generate import Worker, generate_run, local_executor
from openpulid.bench.methods import load_studios, select_presets
from openpulid.bench.multiid import load_cases
from openpulid.bench.report import write_report
from openpulid.bench.run_dir import RunDir
from openpulid.bench.score import score_run
from openpulid.bench.suite import load_suite
from openpulid.errors import OptionError
from openpulid.mini.evaluation.scorers import MiniScorers
from openpulid.mini.evaluation.subjects import synthetic_subjects

PROMPTS = [prompt.text for prompt in load_suite("quick").prompts[:2]]
SUITE = load_suite("multiid-bench")


def entry(number: int, **changes: Any) -> dict[str, Any]:
    """An entry of the list as the benchmark's hf2bench.py writes it."""
    return {
        "prompt": PROMPTS[number],
        "image_paths": [f"{number:04d}_1.jpg"],
        "ori_img_path": f"{number:04d}.jpg",
        **changes,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bench"
    images = folder / "v200_single" / "untar"
    images.mkdir(parents=True)
    for number, subject in enumerate(synthetic_subjects(2, 0)):
        subject.portrait.save(images / f"{number:04d}_1.jpg")
        subject.portrait.transpose(0).save(images / f"{number:04d}.jpg")
    (folder / "v200_single.json").write_text(json.dumps([entry(0), entry(1)]))
    return folder


def test_suite_has_the_prompts_and_people_of_the_list(folder: Path) -> None:
    assert SUITE.recognition == "sface" and not SUITE.prompts
    suite, subjects = load_cases(SUITE, folder)
    assert [(prompt.text, prompt.person) for prompt in suite.prompts] == [
        (PROMPTS[0], "0000"),
        (PROMPTS[1], "0001"),
    ]
    assert [suite.prompts_of(subject.name) for subject in subjects] == [[0], [1]]
    for subject in subjects:  # the ground truth is mirrored
        assert subject.other is not None
        difference = ImageChops.difference(subject.portrait.transpose(0), subject.other)
        assert max(high for _, high in difference.getextrema()) < 40
    assert len(load_cases(SUITE, folder, limit=1)[1]) == 1


def test_every_person_has_only_their_own_prompt(folder: Path, tmp_path: Path) -> None:
    suite = replace(SUITE, preset="mini-lightning", options={"num_inference_steps": 2})
    suite, subjects = load_cases(suite, folder)
    presets = select_presets(suite, ["pulid"])
    run_dir = RunDir(tmp_path / "run")
    worker = Worker(suite, load_studios(suite, presets, "cpu"), subjects, run_dir)
    generate_run(suite, presets, subjects, run_dir, local_executor(worker))
    score_run(run_dir, MiniScorers.load())
    run = run_dir.load()
    assert [(key.person, key.prompt) for key in run.keys("pulid")] == [("0000", 0), ("0001", 1)]
    assert len(run.images) == 4 and set(run.images) == set(run.records)
    assert run.suite.to_json() == suite.to_json()
    page = next(path for path in write_report(run) if path.suffix == ".html").read_text("utf-8")
    assert page.count(PROMPTS[1]) == 1 and "missing" not in page


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry(0, image_paths=["a.jpg", "b.jpg"])], "case 0000 has several people"),
        ([entry(0, image_paths=["../../anna.jpg"])], r"\.\./\.\./anna.jpg\" is not the name of a"),
        ([entry(0, ori_img_path="/anna.jpg")], '/anna.jpg" is not the name of a file'),
        ([entry(0), entry(0)], "needs a ground truth of another name"),
        ([entry(0, image_paths=[])], "is not valid"),
        ([], "needs a ground truth"),
    ],
)
def test_other_lists_are_refused(folder: Path, entries: list[Any], message: str) -> None:
    (folder / "v200_single.json").write_text(json.dumps(entries))
    with pytest.raises(OptionError, match=message):
        load_cases(SUITE, folder)


def test_missing_list_names_the_converter(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"v200_single.json does not exist; .*hf2bench.py"):
        load_cases(SUITE, tmp_path)
