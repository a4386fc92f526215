"""PhotoMaker in training: a repeated word is fused with tokens of CLIP's vision encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from openpulid.methods.photomaker.encoders import PhotoMakerEncoder
from openpulid.mini.train.baselines.base import Baseline
from openpulid.mini.train.baselines.clip import ClipBaseline, copy_vision_encoder, vision_config
from openpulid.mini.train.baselines.marked_words import DroppablePhotoMaker
from openpulid.mini.train.baselines.tensors import (
    create_lora,
    lora_tensors,
    save_half,
    train_lora,
)
from openpulid.training import StepRNG
from openpulid.training.pulid import Batch, drop_captions, drop_identity

PROJECTION_WIDTH = 64
"""Of PhotoMaker's first projection; the second fills the remaining width of the text embeddings."""


class PhotoMakerBaseline(ClipBaseline):
    """PhotoMaker v1.

    A dropped identity also has no caption: its authors replace the whole prompt by an empty one in
    a tenth of the images (arXiv 2312.04461, section 4.1), which is also PuLID's fraction.
    """

    masks_loss = True
    method: DroppablePhotoMaker

    @property
    def vision_encoder(self) -> CLIPVisionModelWithProjection:
        """The id encoder, which is a vision encoder with further layers."""
        return self.method.encoder

    def drop(self, batch: Batch, dropped: Tensor, rng: StepRNG) -> Batch:
        """Drop identities and captions where `dropped` (B,) is true."""
        return drop_captions(drop_identity(batch, dropped), dropped)

    def save(self, path: Path, pipe: Any) -> Path:
        """Save the encoder and the LoRA."""
        parts = {
            "id_encoder": self.method.encoder.state_dict(),
            "lora_weights": lora_tensors(self.method),
        }
        flat = {
            f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()
        }
        return save_half(flat, path, self.describe_vision_encoder())


def photomaker(pipe: Any, clip: CLIPVisionModelWithProjection) -> Baseline:
    """Create PhotoMaker v1 on a CLIP of the miniature.

    Its authors train a part of the vision encoder's layers (arXiv 2312.04461, section 3.2); here it
    is the last `TRAINED_LAYERS`.

    Args:
        pipe: the miniature's pipeline.
        clip: the vision encoder.
    """
    width = pipe.unet.config.cross_attention_dim
    encoder = PhotoMakerEncoder(vision_config(clip, PROJECTION_WIDTH), width)
    last_layers = copy_vision_encoder(encoder, clip)
    method = DroppablePhotoMaker(encoder, create_lora(pipe.unet))
    trained = nn.ModuleList(
        [
            encoder.visual_projection,
            encoder.visual_projection_2,
            encoder.fuse_module,
            train_lora(method),
        ]
    )
    return PhotoMakerBaseline(method, trained, last_layers)
