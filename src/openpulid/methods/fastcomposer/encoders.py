"""FastComposer's image encoder and fusion module (arXiv 2305.10431, section 4.1).

The image encoder is CLIP's, whose last two layers are fine-tuned. Parameter names are those of the
published file; sizes are read from the tensors.

Shapes: n images, N patches, S width of the image encoder, D width of the text.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from openpulid.identity.clip_extractor import clip_config
from openpulid.io.checkpoints import explain_bad_weights, load_state, read_tensors
from openpulid.methods.photomaker.encoders import FuseModule, read_vision_config

PARTS = ("image_encoder.", "postfuse_module.")
"""Prefixes of the encoder's tensors in the published file."""


class FastComposerEncoder(nn.Module):
    """Image encoder with a projection to the width of the text, and the fusion module.

    Args:
        config: of the image encoder; its projection has the width D.
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.image_encoder = CLIPVisionModelWithProjection(config)
        self.postfuse_module = FuseModule(config.projection_dim)

    @property
    def width(self) -> int:
        """D: 768 in the published file, which is for Stable Diffusion 1.5."""
        return self.image_encoder.config.projection_dim

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FastComposerEncoder:
        """Load the encoder from a file of FastComposer, without its other parts.

        Args:
            path: the file. If its image encoder is not CLIP-L, its metadata have the configuration
                (`tower`).

        Raises:
            WeightsError: The file does not exist or is damaged, or names are missing or unexpected.
        """
        tensors = read_tensors(path, prefix=PARTS[0]) | read_tensors(path, prefix=PARTS[1])
        config = read_vision_config(path, f"{path} is damaged; download it again")
        return cls.from_tensors(tensors, config)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], config: CLIPVisionConfig | None = None
    ) -> FastComposerEncoder:
        """Build the encoder from the published tensors.

        Args:
            tensors: by their published names, without those of the other parts of the file.
            config: of the image encoder; CLIP-L's with the tensors' sizes by default.

        Raises:
            WeightsError: Names are missing or unexpected, or a shape differs.
        """
        message = "these are not weights of FastComposer"
        # old files contain the position numbers
        weights = {name: x for name, x in tensors.items() if not name.endswith("position_ids")}
        with explain_bad_weights(message):
            if config is None:
                config = clip_config(
                    {name.removeprefix(PARTS[0]): x for name, x in weights.items()}
                )
            model = cls(config)
        load_state(model, weights, message)
        return model.eval().requires_grad_(False)

    def encode(self, states: Tensor) -> Tensor:
        """Compute one token per image, (n, D), from the encoder's last states (n, 1 + N, S)."""
        pooled = self.image_encoder.vision_model.post_layernorm(states[:, 0])
        tokens: Tensor = self.image_encoder.visual_projection(pooled)
        return tokens
