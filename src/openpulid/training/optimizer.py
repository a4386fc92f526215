"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from openpulid.training.muon import Muon
from openpulid.training.schedule import TrainerConfig

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Device types with a one-kernel AdamW."""


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], config: TrainerConfig
) -> torch.optim.Optimizer:
    """Create the optimizer of a run. Weight decay acts on matrices and kernels alone.

    Args:
        parameters: "module.name" -> parameter.
        config: of the run; its `lr_scales` have the names of modules.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        scale = config.lr_scales.get(name.split(".")[0], 1.0)
        groups.setdefault(scale, []).append(parameter)
    if config.optimizer == "muon":
        return Muon(
            [{"params": group, "lr_scale": scale} for scale, group in groups.items()],
            config.lr,
            config.weight_decay,
        )
    split_groups: list[dict[str, Any]] = []
    for scale, group in groups.items():
        matrices = [p for p in group if p.ndim > 1]
        vectors = [p for p in group if p.ndim <= 1]
        split_groups += [
            {"params": matrices, "lr_scale": scale, "weight_decay": config.weight_decay},
            {"params": vectors, "lr_scale": scale, "weight_decay": 0.0},
        ]
    device = next(iter(parameters.values())).device
    return torch.optim.AdamW(
        [group for group in split_groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        fused=device.type in FUSED_DEVICES or None,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of an optimizer of `build_optimizer`, with the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
