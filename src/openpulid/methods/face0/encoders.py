"""Face0's network: a face embedding -> three vectors in the place of text tokens.

Shapes: E width of the face embedding, C width of the text tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from openpulid.errors import WeightsError
from openpulid.io.checkpoints import explain_bad_weights, group_tensors, read_tensors
from openpulid.methods.hooks import find_unet
from openpulid.methods.lora import LoraMatrices, check_lora, parse_lora
from openpulid.methods.second_attention import load_networks

NUM_TOKENS = 3

PARTS = ("face_mlp", "lora_weights")
"""Of a file. The LoRA may be missing."""


class FaceMLP(nn.Sequential):
    """Four linear layers with ReLU between them.

    Args:
        width: E.
        hidden: width of the hidden layers; 768 in the paper.
        token_width: C.
    """

    def __init__(self, width: int, hidden: int, token_width: int) -> None:
        super().__init__(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, NUM_TOKENS * token_width),
        )
        self.width = width
        self.token_width = token_width

    @classmethod
    def build(cls, tensors: Mapping[str, Tensor]) -> FaceMLP:
        """Create the network with the sizes of its tensors."""
        hidden, width = tensors["0.weight"].shape
        return cls(width, hidden, tensors["6.bias"].shape[0] // NUM_TOKENS)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map (P, E) to (P, 3, C)."""
        tokens: Tensor = super().forward(embeddings)
        return tokens.unflatten(-1, (NUM_TOKENS, -1))


def overwrite_text(text: Tensor, tokens: Tensor, scale: float = 1.0) -> Tensor:
    """Overwrite the last three text tokens.

    Args:
        text: (B, L, C), states of the prompts.
        tokens: (B, 3, C); zeros for no face.
        scale: 1 overwrites, 0 keeps the text.

    Returns:
        (B, L, C).
    """
    last = torch.lerp(text[:, -NUM_TOKENS:], tokens.to(text), scale)
    return torch.cat([text[:, :-NUM_TOKENS], last], 1)


def combine_predictions(
    both: Tensor, text: Tensor, face: Tensor, joint: float, face_share: float
) -> Tensor:
    """Combine predictions of the noise (Face0, section 3.4).

    m = c * e(text, face) + (1 - c) * (a * e(face) + (1 - a) * e(text)), which takes the place of
    the positive prediction in classifier-free guidance.

    Args:
        both: with the prompt and the face.
        text: with the prompt alone.
        face: with the face alone.
        joint: c.
        face_share: a.
    """
    alone = face_share * face + (1 - face_share) * text
    return joint * both + (1 - joint) * alone


def load_file(path: str | os.PathLike[str]) -> tuple[FaceMLP, LoraMatrices]:
    """Load a file with the parts `face_mlp` and `lora_weights`.

    Raises:
        WeightsError: the file is missing or damaged, or has other parts.
    """
    parts = group_tensors(read_tensors(path))
    if not set(parts) <= set(PARTS):
        raise WeightsError(
            f"a file of Face0 has the parts {' and '.join(PARTS)}; {path} has {', '.join(parts)}."
        )
    message = f"{path} is no complete file of Face0"
    mlp = load_networks(FaceMLP.build, parts.get(PARTS[0], {}), message)
    with explain_bad_weights(message):
        return mlp, parse_lora(parts.get(PARTS[1], {}))


def check_networks(target: Any, mlp: FaceMLP, lora: LoraMatrices) -> None:
    """Raise an error if networks do not fit a pipeline or U-Net of SDXL.

    Raises:
        OptionError: the target has no U-Net.
        WeightsError: the networks were trained for another base model.
    """
    unet = find_unet(target)
    width = unet.config.cross_attention_dim
    if mlp.token_width != width:
        raise WeightsError(
            f"this adapter has text tokens of width {mlp.token_width}, and this U-Net reads tokens "
            f"of width {width}; use a file that was trained on this base model."
        )
    check_lora(unet, lora)
