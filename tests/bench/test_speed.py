"""What an identity costs: measured on networks of a few thousand weights."""

from __future__ import annotations

from functools import partial

import pytest
import tiny
import torch

from openpulid.bench import identify, speed
from openpulid.bench.training import RandomSDXL
from openpulid.bench.turns import by_turns
from openpulid.identity.vision import VisionTower
from openpulid.methods.pulid.encoders import IDFormer


def test_candidates_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    seconds = {"a": iter([99.0, 1.0, 3.0, 2.0]), "b": iter([99.0, 5.0, 4.0, 6.0])}

    def run(name: str) -> float:
        order.append(name)
        return next(seconds[name])

    done: list[tuple[int, int]] = []
    medians = by_turns({name: partial(run, name) for name in seconds}, 3, lambda *counts: done.append(counts))
    assert medians == {"a": 2.0, "b": 5.0} and order == ["a", "b"] * 4 and done[-1] == (8, 8)


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_with_and_without(guided: bool) -> None:
    pipe = tiny.pipe()
    base = RandomSDXL(pipe.unet, pipe.vae)
    rows = speed.measure(base, speed.random_adapter(base, tokens=6), pixels=16, guided=guided, rounds=1)
    assert [row.name for row in rows] == ["base", "pulid", "afresh"]
    assert rows[0].ratio == 1.0 and all(row.seconds > 0 for row in rows)
    assert not base.unet._forward_pre_hooks


def test_knowing_a_person_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(VisionTower, embed_dim=16, depth=5, num_heads=2, num_classes=4)
    former = partial(IDFormer, dim=16, depth=5, dim_head=8, heads=2, output_dim=8, vit_dim=1024, hidden_dim=8)
    monkeypatch.setattr(identify, "VisionTower", small)
    monkeypatch.setattr(identify, "IDFormer", former)
    rows = {row.name: row for row in identify.measure(torch.device("cpu"), rounds=1)}
    assert list(rows) == ["detect", "recognise", "parse", "detect again", "tower", "encode", "sum"]
    assert rows["detect again"].here is None and rows["detect"].here == rows["detect"].reference
    assert rows["sum"].here == pytest.approx(sum(row.here or 0 for row in list(rows.values())[:-1]))
    assert rows["sum"].reference > rows["sum"].here
