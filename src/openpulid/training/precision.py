"""The precision of a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from openpulid.loading import multiplies_bf16


class _FloatAttention(TorchFunctionMode):
    """Attention in float32, whatever the precision around it; results in the precision of the queries."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        dtype = (args[0] if args else kwargs["query"]).dtype
        with torch.autocast("cpu", enabled=False):
            return func(*map(_raised, args), **{name: _raised(value) for name, value in kwargs.items()}).to(dtype)


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 else value


@contextmanager
def attention(device: torch.device) -> Iterator[None]:
    """On a CPU attention stays in float32: PyTorch's backward pass of it takes five times as long in bfloat16, which is
    40% of a small U-Net's whole step. Open it around a backward pass that runs checkpointed blocks again."""
    if device.type != "cpu":
        yield
        return
    with _FloatAttention():
        yield


@contextmanager
def mixed(device: torch.device, bf16: bool = True) -> Iterator[None]:
    """bfloat16 autocast with `attention`; float32 without `bf16`, and where `multiplies_bf16` says that it does not pay."""
    if not (bf16 and multiplies_bf16(device)):
        yield
        return
    with torch.autocast(device.type, torch.bfloat16), attention(device):
        yield
