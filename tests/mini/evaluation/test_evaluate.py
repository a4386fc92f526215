"""The evaluation table of the miniature: its prompts, rows and formats."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from openpulid.bench.metrics import Faces, Interval
from openpulid.io.image_grid import to_tensor
from openpulid.mini.evaluation import evaluate
from openpulid.mini.evaluation.adapters import find_adapters
from openpulid.mini.evaluation.evaluate import Table
from openpulid.mini.evaluation.prompts import (
    EvalPrompt,
    render_ground_truth,
    render_portraits,
    sample_prompts,
)
from openpulid.mini.evaluation.scorers import MiniScorers
from openpulid.world import ATTRIBUTES, HELD_OUT_PEOPLE, VOCABULARY, Person


def embed_center(images: Tensor) -> Faces:
    masks = torch.zeros(len(images), 1, *images.shape[2:])
    masks[:, :, 40:56, 40:56] = 1
    return Faces(
        torch.ones(len(images), dtype=torch.bool), images[:, :, 40:56, 40:56].flatten(1), masks
    )


SCORERS = MiniScorers(
    faces=embed_center,
    embed_images=lambda images: images.mean(dim=(2, 3)),
    embed_texts=lambda prompts: torch.ones(len(prompts), 3),
    read=lambda images: {
        name: torch.eye(len(v))[:1].expand(len(images), -1) for name, v in ATTRIBUTES.items()
    },
)


def test_prompts_do_not_depend_on_model() -> None:
    prompts = sample_prompts(people=3, prompts=2, people_seed=5)
    assert prompts == sample_prompts(3, 2, 5)
    assert prompts[2:] == [  # a person does not depend on the number of the first
        EvalPrompt(r.person + 1, r.prompt, r.seed, r.scene) for r in sample_prompts(2, 2, 6)
    ]
    assert [prompt.person for prompt in prompts] == [0, 0, 1, 1, 2, 2]
    for prompt in prompts:
        assert set(prompt.prompt.replace(",", " , ").split()) <= set(VOCABULARY)
        assert all(0 <= value < len(ATTRIBUTES[name]) for name, value in prompt.wanted.items())


def test_scenes_do_not_depend_on_the_values_of_the_face() -> None:
    (prompt,) = sample_prompts(people=1, prompts=1)
    values = Person.from_seed(HELD_OUT_PEOPLE).vector()[:12]
    assert not np.allclose(prompt.scene.jitter, 2 * np.asarray(values) - 1, atol=0.2)


def test_truth_of_one_person_has_another_face() -> None:
    own, other = render_ground_truth(sample_prompts(1, 1), 1)
    assert (own - other).abs().max() > 0.1


def test_image_equal_to_portrait_scores_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate_images(studio, batches, identities):
        prompts = [prompt for batch in batches for prompt in batch]
        images = torch.full((len(prompts), 3, 96, 96), 0.5)
        for image, prompt in zip(images, prompts, strict=True):
            if identities:
                image[:, 40:56, 40:56] = identities[prompt.person][0, :, 40:56, 40:56]
        return images

    monkeypatch.setattr(
        evaluate,
        "load",
        lambda preset, device, adapter: SimpleNamespace(identify=to_tensor),
    )
    monkeypatch.setattr(
        evaluate, "iterate_models", lambda studio, adapters: [(name, studio) for name in adapters]
    )
    monkeypatch.setattr(evaluate, "generate_images", generate_images)
    monkeypatch.setattr(evaluate.MiniScorers, "load", lambda: SCORERS)
    table = evaluate.run(people=3, prompts=2, adapters={"stage1": Path("nowhere")})
    base, stage1 = table.rows["base"], table.rows["stage1"]
    assert stage1["face_sim"].mean == pytest.approx(1, abs=1e-4)
    assert stage1["rank1"].mean == 1 and base["rank1"].mean == pytest.approx(1 / 3)
    assert base["clip_i"].mean == pytest.approx(1) and base["outside_face"].mean == 0
    assert stage1["outside_face"].mean == 0  # only the center differs
    assert stage1["face_found"].mean == 1 and stage1["rank1_of_8"].mean == 1
    assert list(table.rows) == ["base", "stage1", "truth"]
    assert render_portraits(people=2).shape == (2, 3, 96, 96)


def test_json_has_columns_and_no_nan() -> None:
    row = {name: Interval(0.5, 0.4, 0.6) for name in evaluate.COLUMNS} | {
        "attributes": Interval(*[math.nan] * 3)
    }
    line = json.dumps(
        evaluate.to_json(Table({"base": row, "stage1": row}, 64, 4, 0, "mini", 1.0)),
        allow_nan=False,
    )
    rows = json.loads(line)["rows"]
    assert [r["model"] for r in rows] == ["base", "stage1"]
    assert rows[1]["face_sim"] == 0.5 and rows[1]["intervals"]["rank1"] == [0.4, 0.6]
    assert rows[0]["attributes"] is None


def test_table_prints_every_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    row = {name: Interval(0.25, 0.2, 0.3) for name in evaluate.COLUMNS}
    evaluate.print_table(Table({"base": row, "stage1": row}, 8, 1, 0, "mini", 1.0))
    out = capsys.readouterr().out
    assert (
        "stage1" in out
        and "outside" in out
        and out.count("± 0.050") == 2 * 6
        and out.count("0.250") == 2 * 6
    )


def test_adapters_are_shipped_or_locally_trained(tmp_path: Path) -> None:
    weights, runs = tmp_path / "weights", tmp_path / "runs"
    shipped = weights / "pulid-stage1.safetensors"
    ignored = runs / "stage1" / "adapter.safetensors"
    local = runs / "stage2" / "adapter.safetensors"
    for file in (shipped, ignored, local):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert find_adapters(weights=weights, runs=runs) == {"stage1": shipped, "stage2": local}
