"""Figures of other methods' official code on seeded weights, if they are available."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import Golden, M

FIGURES = Path(__file__).parents[3] / "shared" / "golden" / "rivals.safetensors"
TOLERANCE = 2e-5
"""Relative error; the smallest mistake that was tried has 1.4e-4."""

needs_figures = pytest.mark.skipif(
    not FIGURES.exists(), reason="the figures of other methods in shared are not available"
)


class OtherMethods(Golden):
    """Outputs of official code on the same seeded weights and inputs as the reference's."""

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return load_file(FIGURES)

    @torch.no_grad()
    def fill(self, module: M, prefix: str = "") -> M:
        """Fill a module as the reference's; a variance is positive."""
        super().fill(module, prefix)
        for key, value in module.state_dict().items():
            if key.endswith("running_var"):
                value.copy_(1 + self.weight(prefix + key, value.shape).abs())
        return module
