"""What methods share that train the last layers of CLIP's vision encoder."""

from __future__ import annotations

import json

from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from openpulid.identity.identity import Identity
from openpulid.mini.train.baselines.base import Baseline
from openpulid.training.pulid import Batch

TRAINED_LAYERS = 2  # of four in the vision encoder
VISION_CONFIG = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("patch_size", "image_size", "hidden_act"),
)
"""Constructor arguments of a CLIP vision encoder."""


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
    encoder.to(clip.device)
    encoder.vision_model.load_state_dict(clip.vision_model.state_dict())
    encoder.requires_grad_(True).vision_model.requires_grad_(False)
    last_layers = encoder.vision_model.encoder.layers[-TRAINED_LAYERS:]
    trained = nn.ModuleList([*last_layers, encoder.vision_model.post_layernorm])
    return trained.requires_grad_(True)
