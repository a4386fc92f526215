"""InfiniteYou in training: a ControlNet of FLUX that reads identity tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import FluxControlNetModel
from torch import nn

from openpulid.methods.infiniteyou import (
    FILES,
    INFUSENET,
    PREFIX,
    FaceProjection,
    InfiniteYou,
    InfuseNet,
)
from openpulid.methods.ip_adapter import build_resampler, projection_state
from openpulid.mini.models import save_folder
from openpulid.mini.train.baselines.base import Baseline
from openpulid.mini.train.baselines.tensors import resampler, save_half

TOKENS = 8
"""As published (arXiv 2503.16418, section 3.2)."""


class InfiniteYouBaseline(Baseline):
    """InfiniteYou: a folder with the projection and InfuseNet.

    The control image is always black: the base model decides where the face is. Identities are
    never dropped, because the negative prompt gets no residuals.
    """

    method: InfiniteYou
    needs_identity = True

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the projection, and InfuseNet in 8 bits."""
        path.mkdir(parents=True, exist_ok=True)
        state = projection_state(self.method.projection.resampler)
        save_half({f"{PREFIX}{name}": x for name, x in state.items()}, path / FILES[0])
        save_folder(self.method.infusenet.model, path / INFUSENET, in_8_bits=True)
        return path


def infiniteyou(pipe: Any, face: int) -> Baseline:
    """Create InfiniteYou: a Resampler, and InfuseNet, a copy of one double and one single block.

    Args:
        pipe: of the miniature with FLUX's architecture.
        face: width of the face embedding.
    """
    config = pipe.transformer.config
    tensors = resampler(face, TOKENS, config.joint_attention_dim)
    net = FluxControlNetModel.from_transformer(
        pipe.transformer,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
    )
    method = InfiniteYou(FaceProjection(build_resampler(tensors)), InfuseNet(net))
    trained = nn.ModuleList([method.projection.resampler, net]).requires_grad_(True)
    return InfiniteYouBaseline(method, trained)
