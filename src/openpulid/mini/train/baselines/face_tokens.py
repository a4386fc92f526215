"""Face0 in training: a face embedding in the last three text tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openpulid.methods.face0 import Face0
from openpulid.methods.face0.encoders import PARTS, FaceMLP
from openpulid.methods.lora import parse_lora
from openpulid.mini.train.baselines.base import Baseline
from openpulid.mini.train.baselines.tensors import (
    create_lora,
    lora_tensors,
    save_half,
    train_lora,
)
from openpulid.training import StepRNG
from openpulid.training.pulid import Batch


class Face0Baseline(Baseline):
    """Face0.

    Its authors train with L_diff alone and zero the face vectors with probability 0.1, which is
    also PuLID's for its features (arXiv 2306.06638).
    """

    method: Face0

    @contextmanager
    def use(self, batch: Batch, pipe: Any, rng: StepRNG | None = None) -> Iterator[Any]:
        """Open the method; where the identity is dropped, the three vectors are zero."""
        keep = batch.id_cond.any(1)

        def zero_vectors(network: nn.Module, args: Any, vectors: Tensor) -> Tensor:
            return vectors * keep[:, None, None].to(vectors)

        handle = self.method.networks.register_forward_hook(zero_vectors)
        try:
            with super().use(batch, pipe, rng) as method:
                yield method
        finally:
            handle.remove()

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the MLP and the LoRA."""
        mlp, lora = PARTS
        tensors = {f"{mlp}.{name}": x for name, x in self.method.networks.state_dict().items()}
        tensors |= {f"{lora}.{name}": x for name, x in lora_tensors(self.method).items()}
        return save_half(tensors, path)


def face0(pipe: Any, face: int) -> Baseline:
    """Create Face0: an MLP as wide as a text token, and a LoRA of all attention layers.

    Its authors train all of the U-Net.

    Args:
        pipe: the miniature's pipeline.
        face: width of the face embedding.
    """
    width = pipe.unet.config.cross_attention_dim
    networks = FaceMLP(face, width, width)
    method = Face0(networks, parse_lora(create_lora(pipe.unet)))
    return Face0Baseline(method, nn.ModuleList([networks, train_lora(method)]))
