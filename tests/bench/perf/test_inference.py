"""Tests of the inference and face analysis benchmarks, on networks of a few thousand weights."""

from __future__ import annotations

import shutil
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from openpulid.bench.perf import face_analysis, inference
from openpulid.bench.perf.random_models import RandomSDXL
from openpulid.bench.perf.timing import (
    interleave,
    medians,
    ratios,
    time_hooks,
)
from openpulid.device import peak_memory, reset_peak_memory, synchronize
from openpulid.errors import OptionError
from openpulid.identity.eva_clip import VisionEncoder
from openpulid.methods.pulid.encoders import IDFormer
from tests.support import tiny_sdxl as tiny

CPU = torch.device("cpu")
TWO_PASSES = ["base, two passes", "pulid, two passes", "recomputed, two passes"]
TINY_FLUX = {
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "axes_dims_rope": (4, 6, 6),
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
}


def flux_target(level: str = "full") -> inference.FluxTarget:
    return inference.FluxTarget(
        CPU, torch.float32, pixels=64, depth=0.1, text_tokens=4, level=level, **TINY_FLUX
    )


def test_candidates_are_interleaved_and_first_round_is_not_counted() -> None:
    order: list[str] = []
    seconds = {"a": iter([99.0, 1.0, 3.0, 2.0]), "b": iter([99.0, 5.0, 4.0, 6.0])}

    def run(name: str) -> float:
        order.append(name)
        return next(seconds[name])

    progress: list[tuple[int, int]] = []
    measured = interleave(
        {name: partial(run, name) for name in seconds}, 3, lambda *counts: progress.append(counts)
    )
    assert medians(measured) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b", "b", "a"] * 2 and progress[-1] == (8, 8)
    assert ratios(measured) == {"a": 1.0, "b": 3.0}  # of 5, 4 / 3 and 3


@pytest.mark.parametrize("pre", [False, True])
def test_time_of_hooks_is_measured_without_the_module(pre: bool) -> None:
    class SlowModule(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(0.1)
            return x

    def slow_hook(*_: Any) -> None:
        time.sleep(0.02)

    module = SlowModule()
    if pre:
        module.register_forward_pre_hook(slow_hook)
    else:
        module.register_forward_hook(slow_hook)
    with time_hooks([module], CPU, pre=pre) as seconds:
        module(torch.zeros(1))
        module(torch.zeros(1))
    assert len(seconds) == 2 and all(0.02 <= value < 0.09 for value in seconds)
    assert len(module._forward_hooks) + len(module._forward_pre_hooks) == 1


def test_memory_of_the_right_accelerator_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[torch.device] = []

    def max_memory_allocated(device: torch.device) -> int:
        devices.append(device)
        return 3 * 2**30

    library = SimpleNamespace(
        reset_peak_memory_stats=devices.append, max_memory_allocated=max_memory_allocated
    )
    monkeypatch.setattr(torch, "get_device_module", lambda device: library)
    monkeypatch.setattr(torch.accelerator, "synchronize", devices.append)
    second_gpu = torch.device("cuda", 1)
    synchronize(second_gpu)
    reset_peak_memory(second_gpu)
    assert peak_memory(second_gpu) == 3 and devices == [second_gpu] * 3
    # Apple's GPUs have no counters
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    reset_peak_memory(second_gpu)
    assert peak_memory(second_gpu) is None


@pytest.mark.parametrize("guided", [False, True])
def test_sdxl_step_is_measured_with_and_without_identity(guided: bool) -> None:
    pipe = tiny.pipe()
    target = inference.SDXLTarget(RandomSDXL(pipe.unet, pipe.vae), pixels=16, guided=guided)
    output = target.step()
    base, pulid, *more = inference.measure(target, rounds=1)
    assert [row.name for row in (base, pulid, *more)] == [
        "base",
        "pulid",
        "recomputed",
        *(TWO_PASSES if guided else []),
    ]
    assert base.ratio == 1.0 and all(row.seconds > 0 for row in (base, pulid, *more))
    assert pulid.within is not None and 1 < pulid.within < 3 and base.within is None
    assert torch.equal(target.step(), output)
    with target.use_identity():
        assert not torch.allclose(target.step(), output)


def test_sdxl_step_is_measured_at_a_memory_level() -> None:
    pipe = tiny.pipe()
    base = RandomSDXL(pipe.unet, pipe.vae)
    plain = inference.SDXLTarget(base, pixels=16, guided=True).step()
    target = inference.SDXLTarget(base, pixels=16, guided=True, level="8gb")
    layer = pipe.unet.mid_block.resnets[0].conv1
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert target.step().shape == plain.shape
    names = [row.name for row in inference.measure(target, rounds=1, primed=True)]
    assert names == ["base", "pulid", "recomputed", *TWO_PASSES]


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ to compile")
def test_compiled_step_is_that_without() -> None:
    pipe = tiny.pipe()
    base = RandomSDXL(pipe.unet, pipe.vae)
    target = inference.SDXLTarget(base, pixels=16, compiled=True)
    plain = target.step()
    with torch.inference_mode(), target.use_identity():
        compiled = target.step()
    target.compiled = False
    with torch.inference_mode(), target.use_identity():
        torch.testing.assert_close(target.step(), compiled, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(plain, compiled)
    torch.compiler.reset()


def test_two_passes_are_the_halves_of_one_batch() -> None:
    pipe = tiny.pipe()
    target = inference.SDXLTarget(RandomSDXL(pipe.unet, pipe.vae), pixels=16, guided=True)
    outputs: list[torch.Tensor] = []

    def record(unet: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output.sample)

    passes = target.two_passes
    assert passes is not None
    handle = pipe.unet.register_forward_hook(record)
    with torch.inference_mode():
        target.step()
        passes.step()
        with target.use_identity():
            target.step()
        with passes.use_identity():
            passes.step()
        passes.step_recomputed()
    handle.remove()
    assert [len(output) for output in outputs] == [2, 1, 1, 2, 1, 1, 1, 1]
    base, base_prompt, base_none, shown, shown_prompt, _, *recomputed = outputs
    for whole, prompt, none in (
        (base, base_prompt, base_none),
        (shown, shown_prompt, recomputed[1]),
        (shown, *recomputed),
    ):
        torch.testing.assert_close(torch.cat([none, prompt]), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(shown, base)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_step_with_compiled_blocks_is_that_without(name: str) -> None:
    if name == "flux":
        target: Any = flux_target()
    else:
        pipe = tiny.pipe()
        target = inference.SDXLTarget(RandomSDXL(pipe.unet, pipe.vae), pixels=16, guided=True)

    def outputs() -> list[torch.Tensor]:
        base = [target.step() for _ in range(2)]  # FLUX alternates between two timesteps
        with target.use_identity():
            return [*base, *(target.step() for _ in range(2))]

    blocks = list(target.blocks())
    with torch.inference_mode():
        expected = outputs()
        with inference.compile_blocks(target, backend="eager"):
            assert len(blocks) > 4 and all(block._compiled_call_impl for block in blocks)
            torch.testing.assert_close(outputs(), expected, rtol=1e-4, atol=1e-5)
            base, pulid, *_ = inference.measure(target, rounds=1)
            assert base.seconds > 0 and pulid.within is not None and pulid.within > 1
        assert torch.equal(target.step(), expected[0])
    assert not any(block._compiled_call_impl for block in blocks)


def test_identity_work_is_timed_in_every_layer() -> None:
    pipe = tiny.pipe()
    target = inference.SDXLTarget(RandomSDXL(pipe.unet, pipe.vae), pixels=16)
    with target.use_identity(), target.time_identity() as seconds:
        target.step()
    assert len(seconds) == len(target.adapter.id_adapter_attn_layers)
    flux = flux_target()
    with flux.use_identity(), flux.time_identity() as seconds:
        flux.step()
    assert len(seconds) == len(list(flux.adapter.layers)) == 2


def test_flux_step_is_measured_with_and_without_identity() -> None:
    target = flux_target()
    assert len(target.transformer.transformer_blocks) == 2
    assert len(target.transformer.single_transformer_blocks) == 4
    base, pulid, recomputed = inference.measure(target, rounds=1)
    assert [row.name for row in (base, pulid, recomputed)] == ["base", "pulid", "recomputed"]
    assert pulid.within is not None and 1 < pulid.within < 3
    output = target.step()
    target.step()  # the timesteps alternate
    with target.use_identity():
        assert not torch.allclose(target.step(), output)


def test_consecutive_flux_steps_have_different_timesteps() -> None:
    """A second call at the same timestep would be taken for the negative prompt's."""
    target = flux_target()
    first = target.step()
    assert not torch.equal(target.step(), first) and torch.equal(target.step(), first)


def test_flux_step_is_measured_at_a_memory_level() -> None:
    target = flux_target(level="16gb")
    weight = target.transformer.transformer_blocks[0].ff.net[2].weight
    assert weight.dtype == torch.float8_e4m3fn
    names = [row.name for row in inference.measure(target, rounds=1, primed=True)]
    assert names == ["base", "pulid", "recomputed"]


def test_unsupported_options_are_rejected() -> None:
    with pytest.raises(OptionError, match="only available for flux"):
        inference.speed_target("sdxl", CPU, depth=0.5)
    for name in ("sdxl", "mini"):
        message = "no memory level '16gb' for SDXL" if name == "sdxl" else "only available for sdxl"
        with pytest.raises(OptionError, match=message):
            inference.speed_target(name, CPU, level="16gb")
    with pytest.raises(OptionError, match="no memory level"):
        inference.speed_target("flux", CPU, level="8gb")
    with pytest.raises(OptionError, match="--compile is only available for sdxl"):
        inference.speed_target("flux", CPU, compiled=True)
    with pytest.raises(OptionError, match="--guided is not available for flux"):
        inference.speed_target("flux", CPU, guided=True)


def test_face_analysis_is_measured_by_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_vision = partial(VisionEncoder, embed_dim=16, depth=5, num_heads=2, num_classes=4)
    tiny_former = partial(
        IDFormer, dim=16, depth=5, dim_head=8, heads=2, output_dim=8, vit_dim=1024, hidden_dim=8
    )
    monkeypatch.setattr(face_analysis, "VisionEncoder", tiny_vision)
    monkeypatch.setattr(face_analysis, "IDFormer", tiny_former)
    stages = {stage.name: stage for stage in face_analysis.measure(CPU, rounds=1)}
    assert list(stages) == [
        "detection",
        "recognition",
        "parsing",
        "vision encoder",
        "identity encoder",
        "second detection",
        "total",
    ]
    assert stages["second detection"].seconds is None
    assert stages["detection"].seconds == stages["detection"].reference
    assert stages["parsing"].seconds != stages["parsing"].reference  # two runs
    total = stages.pop("total")
    assert total.seconds == pytest.approx(sum(stage.seconds or 0 for stage in stages.values()))
    assert total.reference > total.seconds
