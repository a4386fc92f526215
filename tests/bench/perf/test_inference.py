"""What an identity costs: measured on networks of a few thousand weights."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from openpulid.bench.perf import face_analysis as identify
from openpulid.bench.perf import inference as speed
from openpulid.bench.perf.timing import (
    interleave,
    medians,
    peak,
    ratios,
    reset_peak,
    seconds_in,
    wait,
)
from openpulid.bench.perf.training import RandomSDXL
from openpulid.errors import OptionError
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.methods.pulid.encoders import IDFormer
from tests.support import tiny_sdxl as tiny


def test_candidates_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    seconds = {"a": iter([99.0, 1.0, 3.0, 2.0]), "b": iter([99.0, 5.0, 4.0, 6.0])}

    def run(name: str) -> float:
        order.append(name)
        return next(seconds[name])

    done: list[tuple[int, int]] = []
    found = interleave(
        {name: partial(run, name) for name in seconds}, 3, lambda *counts: done.append(counts)
    )
    assert (
        medians(found) == {"a": 2.0, "b": 5.0}
        and order == ["a", "b", "b", "a"] * 2
        and done[-1] == (8, 8)
    )
    assert ratios(found) == {"a": 1.0, "b": 3.0}  # of 5, 4 / 3 and 3


def test_seconds_in_a_method_are_noted_and_the_class_is_as_it_was() -> None:
    class Slow:
        def work(self, seconds: float) -> float:
            time.sleep(seconds)
            return seconds

    plain = Slow.work
    with pytest.raises(TypeError), seconds_in(Slow, "work") as noted:
        assert Slow().work(0.02) == 0.02
        Slow().work("long")
    assert len(noted) == 2 and noted[0] >= 0.02 > noted[1] and Slow.work is plain


def test_of_several_accelerators_the_one_that_computes_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[torch.device] = []

    def most(device: torch.device) -> int:
        asked.append(device)
        return 3 * 2**30

    library = SimpleNamespace(reset_peak_memory_stats=asked.append, max_memory_allocated=most)
    monkeypatch.setattr(torch, "get_device_module", lambda device: library)
    monkeypatch.setattr(torch.accelerator, "synchronize", asked.append)
    second = torch.device("cuda", 1)
    wait(second)
    reset_peak(second)
    assert peak(second) == 3 and asked == [second] * 3
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())  # as Apple's
    reset_peak(second)
    assert peak(second) is None


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_with_and_without(guided: bool) -> None:
    pipe = tiny.pipe()
    it = speed.SDXLTarget(RandomSDXL(pipe.unet, pipe.vae), pixels=16, guided=guided)
    before = it.step()
    rows = speed.measure(it, rounds=1)
    assert [row.name for row in rows] == [
        "base",
        "pulid",
        "afresh",
        *(["two passes"] if guided else []),
    ]
    assert rows[0].ratio == 1.0 and all(row.seconds > 0 for row in rows)
    assert rows[1].within is not None and 1 < rows[1].within < 3 and rows[0].within is None
    assert torch.equal(it.step(), before)
    with it.opened():
        assert not torch.allclose(it.step(), before)


def test_a_step_of_flux() -> None:
    small = {
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "axes_dims_rope": (4, 6, 6),
        "joint_attention_dim": 8,
    }
    it = speed.FluxTarget(
        torch.device("cpu"),
        torch.float32,
        pixels=64,
        depth=0.1,
        text_tokens=4,
        pooled_projection_dim=8,
        **small,
    )
    assert (
        len(it.transformer.transformer_blocks),
        len(it.transformer.single_transformer_blocks),
    ) == (2, 4)
    before = it.step()
    rows = speed.measure(it, rounds=1)
    assert (
        [row.name for row in rows] == ["base", "pulid", "afresh"]
        and rows[1].within is not None
        and 1 < rows[1].within < 3
    )
    with it.opened():
        assert not torch.allclose(it.step(), before)
    for options in ({"depth": 0.5}, {"level": "16gb"}):
        with pytest.raises(OptionError, match="only FLUX"):
            speed.speed_target("sdxl", torch.device("cpu"), **options)
    with pytest.raises(OptionError, match="no memory level"):
        speed.speed_target("flux", torch.device("cpu"), level="8gb")
    eight = speed.FluxTarget(
        torch.device("cpu"),
        torch.float32,
        pixels=64,
        depth=0.1,
        text_tokens=4,
        level="16gb",
        pooled_projection_dim=8,
        **small,
    )
    assert eight.transformer.transformer_blocks[0].ff.net[2].weight.dtype == torch.float8_e4m3fn
    assert [row.name for row in speed.measure(eight, rounds=1)] == ["base", "pulid", "afresh"]
    with pytest.raises(OptionError, match="without --guided"):
        speed.speed_target("flux", torch.device("cpu"), guided=True)


def test_knowing_a_person_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    small = partial(VisionEncoder, embed_dim=16, depth=5, num_heads=2, num_classes=4)
    former = partial(
        IDFormer, dim=16, depth=5, dim_head=8, heads=2, output_dim=8, vit_dim=1024, hidden_dim=8
    )
    monkeypatch.setattr(identify, "VisionEncoder", small)
    monkeypatch.setattr(identify, "IDFormer", former)
    rows = {row.name: row for row in identify.measure(torch.device("cpu"), rounds=1)}
    assert list(rows) == ["detect", "recognise", "parse", "detect again", "tower", "encode", "sum"]
    assert rows["detect again"].here is None and rows["detect"].here == rows["detect"].reference
    assert rows["sum"].here == pytest.approx(sum(row.here or 0 for row in list(rows.values())[:-1]))
    assert rows["sum"].reference > rows["sum"].here
