"""The precision of a step follows what the processor can do."""

import pytest
import torch

from openpulid.training import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_processor_without_bfloat16_computes_in_float32(monkeypatch, native, expected):
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: native)
    with precision.mixed(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    with precision.mixed(CPU, bf16=False):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_only_a_cpu_is_asked():
    assert precision.multiplies_bf16(torch.device("meta"))
    assert isinstance(precision.multiplies_bf16(CPU), bool)
