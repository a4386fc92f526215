"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from openpulid.training.muon import Muon
from openpulid.training.schedule import TrainerConfig

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Device types with a one-kernel AdamW."""


def build_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainerConfig
) -> torch.optim.Optimizer:
    """Create the optimizer of a run. Weight decay acts on matrices and kernels alone."""
    if config.optimizer == "muon":
        return Muon(parameters, config.lr, config.weight_decay)
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        fused=parameters[0].device.type in FUSED_DEVICES or None,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
