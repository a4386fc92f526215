"""ComfyUI opens the files of `pulid tune`, with its own loaders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import openpulid as pulid
from openpulid.methods.tuned import TextualInversion, Trigger, TunedLora
from tests.support import comfyui
from tests.support.comfyui import call_network, requires_comfyui

pytestmark = requires_comfyui

RANK, SIDE, LATENT = 4, 96, 12


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pulid.load("mini", device="cpu").pipe


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_lora_acts_as_in_diffusers(
    pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, scale: float
) -> None:
    comfyui.import_comfyui()
    import comfy.sd
    import comfy.utils

    layers = {}
    for name in pipe.unet.attn_processors:
        attention = name.removesuffix(".processor")
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            linear = pipe.unet.get_submodule(f"{attention}.{part}")
            down = random(RANK, linear.in_features) / linear.in_features**0.5
            layers[f"{attention}.{part}"] = (down, random(linear.out_features, RANK) / 4)
    lora = TunedLora({"unet": layers}, Trigger("sks"))
    lora.save(tmp_path / "anna.safetensors")

    model = comfyui.load_miniature(pipe)
    file = comfy.utils.load_torch_file(str(tmp_path / "anna.safetensors"))
    patched, _ = comfy.sd.load_lora_for_models(model, None, file, scale, 0.0)
    assert len(patched.patches) == len(layers)
    assert "lora key not loaded" not in caplog.text

    latents, text, pooled = random(1, 20, LATENT, LATENT), random(1, 77, 192), random(1, 128)
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]])}
    lora.attach(pipe)
    outputs = []
    for factor in (0.0, scale):
        with torch.no_grad(), lora.use(None, scale=factor, pipe=pipe):
            outputs.append(pipe.unet(latents, 600, text, added_cond_kwargs=added).sample)
    lora.detach(pipe)
    plain, expected = outputs
    adm = patched.model.encode_adm(pooled_output=pooled, width=SIDE, height=SIDE)
    patched.patch_model()
    ours = call_network(patched, [0], 1.5, latents, torch.tensor([600.0]), text, y=adm)
    largest = expected.abs().max()
    # the file is in float16
    assert (ours - expected).abs().max() < 0.01 * largest < (plain - expected).abs().max() / 10


def test_embedding_is_read_for_both_encoders(tmp_path: Path) -> None:
    comfyui.import_comfyui()
    from comfy.sd1_clip import load_embed

    vectors = {"clip_l": random(2, 768), "clip_g": random(2, 1280)}
    file = tmp_path / "anna.safetensors"
    TextualInversion(vectors, Trigger("anna", replaces_noun=True)).save(file)
    for name, expected in vectors.items():
        read = load_embed("anna", str(tmp_path), expected.shape[1], name)
        assert torch.allclose(read.float(), expected, atol=2e-3)
