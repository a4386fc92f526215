"""Whole requests in every precision: dtype of each network, and the error to float32."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from openpulid.device import best_device, compute_dtype, training_dtype
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines import factory
from openpulid.pipelines.factory import load_adapter, load_extractor, load_pipeline, network_dtype
from openpulid.pipelines.presets import Preset, flux, mini, sdxl
from openpulid.pipelines.request import GenerationRequest, IdentityOptions
from openpulid.pipelines.studio import Studio
from tests.support.people import anna
from tests.support.tiny_flux import fresh, tiny_pipe
from tests.support.versions import same_noise_in_every_precision

CPU = torch.device("cpu")
DEVICES = sorted({"cpu", best_device().type})
REQUEST: dict[str, Any] = {"prompt": "portrait of a person", "seed": 3, "num_inference_steps": 4}

BOUNDS = {torch.float32: 1e-6, torch.float16: 0.006, torch.bfloat16: 0.03}
"""Largest relative error of an image to that in float32, three times of what was measured. float16
resolves 1/2048, bfloat16 1/256, and an image 1/255 of its range."""


class UnusedExtractor:
    """Extractor of a studio that receives identities alone."""

    models = anna.models


@pytest.fixture(scope="module")
def preset(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Any) -> Preset:
    """The preset `sdxl` on a tiny base, with an adapter that is stored in float16."""
    folder = tmp_path_factory.mktemp("sdxl")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "base")
    torch.manual_seed(0)
    adapter = PuLID.for_unet(pipe.unet, IDEncoder(12, 64, vit_dim=8, hidden_dim=16))
    for layer in adapter.id_adapter_attn_layers.values():
        nn.init.normal_(layer.id_to_k.weight, std=0.3)
        nn.init.normal_(layer.id_to_v.weight, std=0.3)
    adapter.half().save(folder / "adapter.safetensors")
    preset = sdxl(folder / "base").with_models(adapter=folder / "adapter.safetensors")
    return preset.with_defaults(width=16, height=16, negative_prompt="red hat")


def generate(preset: Preset, device: torch.device) -> np.ndarray:
    """Generate an image of a whole request, in [0, 1]."""
    pipe, adapter = load_pipeline(preset, device), load_adapter(preset, device)
    pipe.set_progress_bar_config(disable=True)
    studio = Studio(pipe, adapter, UnusedExtractor(), preset)
    request = GenerationRequest(**REQUEST, identity=IdentityOptions(scale=1.0))
    plain = studio.generate(request).images[0]
    image = studio.generate(REQUEST["prompt"], anna, seed=3, num_inference_steps=4).images[0]
    assert np.abs(np.asarray(plain).astype(int) - np.asarray(image)).max() > 3  # it is shown
    return np.asarray(image) / 255


def relative_error(image: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(image - expected) / np.linalg.norm(expected))


@same_noise_in_every_precision
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", BOUNDS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_sdxl_request_is_close_to_float32(
    preset: Preset, device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(preset.with_models(use_half_precision=False), CPU)
    monkeypatch.setattr(factory, "compute_dtype", lambda device: dtype)
    error = relative_error(generate(preset, torch.device(device)), expected)
    print(f"{device}, {dtype}: {error:.5f}")
    assert error < BOUNDS[dtype]


@same_noise_in_every_precision
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux_request_is_close_to_float32(device: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_pipe().save_pretrained(tmp_path / "base")

    def image(dtype: torch.dtype, device: torch.device) -> np.ndarray:
        preset = flux(tmp_path / "base").with_defaults(
            width=32, height=32, max_sequence_length=10, num_inference_steps=4
        )
        pipe = load_pipeline(preset, device, dtype)
        pipe.set_progress_bar_config(disable=True)
        adapter = fresh(pipe).to(device, dtype)
        studio = Studio(pipe, adapter, UnusedExtractor(), preset.with_models(size_multiple=4))
        return np.asarray(studio.generate(REQUEST["prompt"], anna, seed=3).images[0]) / 255

    error = relative_error(image(dtype, torch.device(device)), image(torch.float32, CPU))
    print(f"{device}, {dtype}: {error:.5f}")
    assert error < BOUNDS[dtype]


def test_sdxl_computes_in_float16_on_gpus(set_bf16: Any) -> None:
    """As PuLID's own program does; its error is an eighth of that of bfloat16."""
    gpus = [torch.device(kind) for kind in ("cuda", "mps", "xpu")]
    for available in (True, False):
        set_bf16(available)
        on_cpu = torch.bfloat16 if available else torch.float32
        assert [compute_dtype(gpu) for gpu in gpus] == [torch.float16] * 3
        assert compute_dtype(CPU) is on_cpu and training_dtype(gpus[0]) is on_cpu
        for device in (*gpus, CPU):
            expected = on_cpu if device == CPU else torch.float16
            assert network_dtype(sdxl().models, device) is expected
            assert network_dtype(flux().models, device) is torch.bfloat16
            assert network_dtype(mini().models, device) is torch.float32


def test_identity_networks_of_sdxl_compute_in_float32(
    preset: Preset, both_precisions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = load_adapter(preset, CPU)
    layers = {x.dtype for x in adapter.id_adapter_attn_layers.parameters()}
    # stored as it is published, where the other networks are in reduced precision
    assert layers == {torch.float16 if both_precisions else torch.float32}
    assert {x.dtype for x in adapter.encoder.parameters()} == {torch.float32}
    exact = load_adapter(preset.with_models(use_half_precision=False), CPU)
    tokens = adapter.encode(anna.id_cond, anna.hidden)
    assert torch.equal(tokens, exact.encode(anna.id_cond, anna.hidden))
    expected = exact.keys_values(tokens)
    for key, pair in adapter.keys_values(tokens).items():
        assert pair[0].dtype is torch.float32
        assert all(map(torch.equal, pair, expected[key]))

    monkeypatch.setattr(
        factory.PhotoExtractor, "load", lambda *args: SimpleNamespace(args=args, models={})
    )
    names = ("detector", "recognition", "face_parsing", "vision_encoder")
    files = {name: Path(name) for name in names}
    for changed, expected_dtype in (
        (preset, torch.float32),
        (flux(), torch.bfloat16 if both_precisions else torch.float32),
    ):
        extractor = load_extractor(changed.with_models(**files), CPU)
        assert extractor.args[-1] is expected_dtype
