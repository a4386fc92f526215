"""Precision of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from openpulid.device import supports_bf16


@contextmanager
def autocast(device: torch.device, bf16: bool = True) -> Iterator[None]:
    """Run forward and backward passes in mixed precision: open it around both, and use `backward`.

    Forward passes run in bfloat16 autocast, or in float32 without `bf16` and on devices where
    bfloat16 does not pay off (`supports_bf16`).

    On a CPU, attention stays in float32. PyTorch's fused CPU kernel takes three to five times as
    long in bfloat16 as in float32 when it runs backward, which is 40% of a small U-Net's step. Its
    plain kernel computes bfloat16 inputs in float32. Unlike a function mode, the choice of a kernel
    also holds inside a backward pass, so blocks that gradient checkpointing recomputes take the
    same path as in their forward pass.
    """
    if not (bf16 and supports_bf16(device)):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16):
        if device.type != "cpu":
            yield
            return
        with sdpa_kernel(SDPBackend.MATH):
            yield


def backward(loss: Tensor) -> None:
    """Run the backward pass of a loss inside the `autocast` block that computed it.

    Gradients take the precision of their forward operation. Autocast is off meanwhile, as PyTorch
    recommends, and its cached bfloat16 weights are freed.
    """
    torch.clear_autocast_cache()
    with torch.autocast(loss.device.type, enabled=False):
        loss.backward()
