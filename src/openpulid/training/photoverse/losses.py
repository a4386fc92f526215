"""PhotoVerse's random fusion, and its losses in float32 (arXiv 2309.05793, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from openpulid.methods.photoverse.attention import Fusion

THRESHOLD = 1 / 3
"""Share of the steps with text alone, and of those with visual attention alone."""


def draw_fusion(generator: Generator) -> Fusion:
    """Draw the weights of a training step: text alone, visual attention alone, or both."""
    value = float(torch.rand((), generator=generator))
    if value < THRESHOLD:
        return Fusion(text=2.0, visual=0.0)
    if value > 1 - THRESHOLD:
        return Fusion(text=0.0, visual=2.0)
    return Fusion()


class PhotoVerseLoss(nn.Module):
    """L = L_diff + face * L_face + words * mean|words| + values * mean|V_S|.

    L_face is one minus the cosine similarity of face embeddings. The paper prints it as a function
    of their difference.

    Args:
        face: weight of the face loss.
        words: weight of the words' size.
        values: weight of the size of the visual attention's values.
    """

    def __init__(self, face: float = 0.01, words: float = 0.01, values: float = 0.001) -> None:
        super().__init__()
        self.face = face
        self.words = words
        self.values = values

    def forward(
        self,
        prediction: Tensor,
        target: Tensor,
        faces: tuple[Tensor, Tensor],
        words: Tensor,
        values: Sequence[Tensor],
    ) -> Tensor:
        """Compute the weighted sum, a scalar.

        Args:
            prediction: (B, c, h, w).
            target: (B, c, h, w), the noise.
            faces: face embeddings (B, E) of the reference and of the denoised images.
            words: (B, 5, word width), of the text adapter.
            values: (B, 5, D) of each layer, of the visual tokens.
        """
        reference, generated = (x.float() for x in faces)
        face = 1 - cosine_similarity(reference, generated, dim=-1).mean()
        size = torch.stack([mean_size(x) for x in values]).mean()
        total = mse_loss(prediction.float(), target.float()) + self.face * face
        return total + self.words * mean_size(words) + self.values * size


def mean_size(x: Tensor) -> Tensor:
    """Compute the mean absolute value, a scalar."""
    return x.float().abs().mean()
