"""CLIP's features of a style image."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPVisionModelWithProjection

from openpulid.identity.clip_extractor import center_square, encode_clip, load_clip_encoder
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import read_tensors
from openpulid.io.image_grid import to_tensor
from openpulid.io.networks import load_network


def encode_style(
    vision_encoder: Path, image: Image.Image, device: torch.device, dtype: torch.dtype
) -> Identity:
    """Return the features of an image without a face, as those of an identity.

    Args:
        vision_encoder: file of a published CLIP vision encoder, or the folder of any, whose
            configuration tells the number of heads.
        image: its center square is read.
        device: where to compute.
        dtype: of the vision encoder.

    Raises:
        WeightsError: the vision encoder is missing, damaged, or another network.
    """
    if vision_encoder.is_dir():
        encoder = load_network(CLIPVisionModelWithProjection, vision_encoder, dtype)
    else:
        encoder = load_clip_encoder(read_tensors(vision_encoder, dtype))
    pixels = center_square(to_tensor([image])[0], encoder.config.image_size)
    embedding, states = encode_clip(encoder.to(device, dtype).eval(), pixels)
    return Identity(embedding[:, None], states)
