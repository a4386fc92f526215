"""PhotoMaker and FastComposer in training: words fused with tokens of CLIP's vision encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from openpulid.identity.identity import Identity
from openpulid.methods.photomaker.encoders import PhotoMakerEncoder
from openpulid.methods.photomaker.photomaker import PhotoMaker
from openpulid.mini.train.baselines.base import Baseline
from openpulid.mini.train.baselines.tensors import (
    create_lora,
    lora_tensors,
    save_half,
    train_lora,
)
from openpulid.training.pulid import Batch

TRAINED_LAYERS = 2  # of four in the vision encoder
VISION_CONFIG = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("patch_size", "image_size", "hidden_act"),
)
"""Constructor arguments of a CLIP vision encoder."""
PROJECTION_WIDTH = 64
"""Of PhotoMaker's first projection; the second fills the remaining width of the text embeddings."""


class ClipBaseline(Baseline):
    """A method that is conditioned on the class token of CLIP's last hidden state alone.

    The vision encoder's last layers train, so its input are the reference images.
    """

    @property
    def vision_encoder(self) -> CLIPVisionModelWithProjection:
        """The method's own vision encoder."""
        raise NotImplementedError

    def identities(self, batch: Batch) -> list[Identity]:
        """Return identities whose features are class tokens of the images in `batch.hidden`."""
        encoder = self.vision_encoder
        side = encoder.config.image_size
        pixels = batch.hidden[0].unflatten(-1, (side, side))
        states = encoder.vision_model(pixel_values=pixels).last_hidden_state[:, :1]
        rows = zip(batch.id_cond, states, strict=True)
        return [Identity(row[None, None], (state[None], state[None])) for row, state in rows]

    def describe_vision_encoder(self) -> dict[str, str]:
        """Return a file's metadata: the size of the vision encoder."""
        config = self.vision_encoder.config
        names = (*VISION_CONFIG, "projection_dim")
        return {"tower": json.dumps({name: getattr(config, name) for name in names})}


class PhotoMakerBaseline(ClipBaseline):
    """PhotoMaker v1. As its authors do, it never drops the identity."""

    needs_identity = True
    masks_loss = True
    method: PhotoMaker

    @property
    def vision_encoder(self) -> CLIPVisionModelWithProjection:
        """The id encoder, which is a vision encoder with further layers."""
        return self.method.encoder

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
    """Create PhotoMaker v1 on the miniature's CLIP.

    Its authors train a part of the vision encoder's layers (arXiv 2312.04461, section 3.2); here it
    is the last `TRAINED_LAYERS`.

    Args:
        pipe: the miniature's pipeline.
        clip: the vision encoder.
    """
    width = pipe.unet.config.cross_attention_dim
    encoder = PhotoMakerEncoder(vision_config(clip, PROJECTION_WIDTH), width)
    last_layers = copy_vision_encoder(encoder, clip)
    method = PhotoMaker(encoder, create_lora(pipe.unet))
    trained = nn.ModuleList(
        [
            last_layers,
            encoder.visual_projection,
            encoder.visual_projection_2,
            encoder.fuse_module,
            train_lora(method),
        ]
    )
    return PhotoMakerBaseline(method, trained)


def vision_config(clip: CLIPVisionModelWithProjection, projection_dim: int) -> CLIPVisionConfig:
    """Return the configuration of a vision encoder with another width of its projection."""
    sizes = {name: getattr(clip.config, name) for name in VISION_CONFIG}
    return CLIPVisionConfig(**sizes, projection_dim=projection_dim)


def copy_vision_encoder(
    encoder: CLIPVisionModelWithProjection, clip: CLIPVisionModelWithProjection
) -> nn.ModuleList:
    """Copy the weights of the miniature's CLIP, and freeze all layers but the last ones.

    Args:
        encoder: the method's vision encoder, whose other parts train.
        clip: of the miniature.

    Returns:
        The layers that train.
    """
    encoder.vision_model.load_state_dict(clip.vision_model.state_dict())
    encoder.requires_grad_(True).vision_model.requires_grad_(False)
    last_layers = encoder.vision_model.encoder.layers[-TRAINED_LAYERS:]
    trained = nn.ModuleList([*last_layers, encoder.vision_model.post_layernorm])
    return trained.requires_grad_(True)
