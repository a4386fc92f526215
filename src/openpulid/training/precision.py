"""The precision of a training step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from openpulid.device import supports_bf16


@contextmanager
def autocast(device: torch.device, bf16: bool = True) -> Iterator[None]:
    """Run in bfloat16 autocast, with `fp32_attention`.

    Without `bf16`, and on devices where bfloat16 does not pay (`multiplies_bf16`), run in float32.
    """
    if not (bf16 and supports_bf16(device)):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), fp32_attention(device):
        yield


@contextmanager
def fp32_attention(device: torch.device, bf16: bool = True) -> Iterator[None]:
    """Keep attention in float32 on a CPU while everything else runs in bfloat16.

    PyTorch's fused CPU kernel takes three to five times as long in bfloat16 as in float32 when it
    runs backward, which is 40% of a small U-Net's whole step. Its plain kernel computes bfloat16
    inputs in float32. Unlike a function mode, the choice of a kernel also holds inside `backward`,
    so blocks that gradient checkpointing recomputes take the same path as in their forward pass.
    Open this around the backward pass of everything that ran in `autocast`, with the same `bf16`.
    """
    if device.type != "cpu" or not (bf16 and supports_bf16(device)):
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield
