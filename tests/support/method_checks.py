"""What every method must do in a stock pipeline, checked alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.token_files import generate


def check_lora_of_user_stays(pipe: Any, method: Any, person: Any, layer_name: str) -> None:
    """Check that a method acts next to a user's LoRA of one layer, and leaves it as it was.

    The method stays attached, and nothing of it is left in the pipeline.
    """
    pytest.importorskip("peft")
    with method.use(person):
        without_lora = generate(pipe)
    layer = pipe.unet.get_submodule(layer_name)
    torch.manual_seed(4)
    own = {
        f"unet.{layer_name}.lora_A.weight": torch.randn(2, layer.in_features) / 8,
        f"unet.{layer_name}.lora_B.weight": torch.randn(layer.out_features, 2),
    }
    pipe.load_lora_weights(own, adapter_name="own")
    method.attach(pipe)  # a layer has another class now
    baseline = generate(pipe)
    for _ in range(2):
        with method.use(person):
            shown = generate(pipe)
            assert not torch.allclose(shown, baseline, atol=1e-4)
            assert not torch.allclose(shown, without_lora, atol=1e-4)
        assert torch.equal(generate(pipe), baseline)
    with method.use(person, scale=0):
        assert torch.equal(generate(pipe), baseline)


def check_bfloat16(pipe: Any, method: Any, person: Any) -> None:
    """Check a pipeline and a method in bfloat16: about the same change of the image as in float32.

    Processors without bfloat16 emulate it.
    """
    with method.use(person, start=0.0):
        expected = generate(pipe).float()
    plain = generate(pipe).float()
    pipe.to(torch.bfloat16)
    method.to(pipe.device, torch.bfloat16)
    base = generate(pipe)
    with method.use(person, start=0.0):
        shown = generate(pipe)
    assert base.dtype == shown.dtype == torch.bfloat16
    assert torch.equal(generate(pipe), base)
    change = shown.float() - base.float()
    error = (change - (expected - plain)).norm() / (expected - plain).norm()
    assert error < 0.5
