"""The precision of a step depends on the device."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from openpulid.device import supports_bf16
from openpulid.pipelines.factory import network_dtype
from openpulid.pipelines.presets import flux, mini, sdxl
from openpulid.training import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_device_without_bfloat16_computes_in_float32(set_bf16, native, expected):
    set_bf16(native)
    with precision.autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    with precision.autocast(CPU, bf16=False):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    assert network_dtype(sdxl().models, CPU) == expected
    assert network_dtype(flux().models, CPU) == torch.bfloat16  # 48 GB otherwise
    assert network_dtype(mini().models, CPU) == torch.float32


@pytest.mark.parametrize("bf16", [True, False])
def test_checkpointed_attention_is_recomputed_in_the_same_precision(both_precisions, bf16):
    """A block that is recomputed during backward saves the tensors that its forward pass saved."""

    def attend(x):
        return torch.nn.functional.scaled_dot_product_attention(x @ x.mT @ x, x, x)

    def gradient(block):
        x = torch.randn(2, 4, 8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with precision.autocast(CPU, bf16):
            precision.backward(block(x).float().square().sum())
        return x.grad

    plain = gradient(attend)
    checkpointed = gradient(lambda x: checkpoint(attend, x, use_reentrant=False))
    assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize(
    ("there", "says", "expected"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_bfloat16_support_of_a_cpu_comes_from_onednn(monkeypatch, there, says, expected):
    def supported() -> bool:
        assert there, "must not be called without oneDNN"
        return says

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: there)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", supported)
    assert supports_bf16(CPU) is expected
    assert supports_bf16(torch.device("meta"))
