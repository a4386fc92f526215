"""What a base model is trained on: latents and encoded captions, all on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.mini.accelerated.autoencoder import encode
from openpulid.mini.accelerated.scenes import CaptionWriter
from openpulid.mini.accelerated.world import World
from openpulid.mini.models import TextEncoders
from openpulid.training.pulid import TextConditioning

CAPTIONS = 2
"""Captions per image."""


@dataclass(frozen=True)
class TrainSet:
    """N images with V captions each.

    Attributes:
        latents: (N, C, s, s) float16.
        faces: (N, 1, s, s) float16, the fraction of each position that the face covers.
        tokens: (N, V, L) uint8 token ids of the captions.
        embeds: (N, V, L, D) bfloat16 text embeddings.
        pooled: (N, V, P) bfloat16 pooled embeddings.
        size: width and height of the images in pixels.
    """

    latents: Tensor
    faces: Tensor
    tokens: Tensor
    embeds: Tensor
    pooled: Tensor
    size: int

    def text(self, rows: Tensor, variants: Tensor) -> TextConditioning:
        """Return the encoded captions `variants` (B,) of the images `rows` (B,)."""
        embeds = self.embeds[rows, variants].float()
        pooled = self.pooled[rows, variants].float()
        return TextConditioning(embeds, pooled, time_ids(self.size, len(rows), embeds.device))


def time_ids(size: int, count: int, device: torch.device) -> Tensor:
    """Return SDXL's size conditions (count, 6) for square images of `size` pixels."""
    # not from a list of values: a CUDA graph cannot copy from the CPU
    ids = torch.full((6,), float(size), device=device)
    ids[2:4] = 0.0
    return ids.expand(count, -1)


def add_unconditional(text: TextConditioning) -> TextConditioning:
    """Return 2 B texts for guidance: B unconditional ones, which are zero, and then `text`."""
    assert text.time_ids is not None, "SDXL's architecture has size conditions"
    return TextConditioning(
        torch.cat([torch.zeros_like(text.embeds), text.embeds]),
        torch.cat([torch.zeros_like(text.pooled), text.pooled]),
        torch.cat([text.time_ids, text.time_ids]),
    )


@torch.no_grad()
def build_train_set(
    vae: PatchAutoencoderKL,
    text_encoders: TextEncoders,
    writer: CaptionWriter,
    world: World,
    generator: torch.Generator,
    captions: int = CAPTIONS,
    batch: int = 1024,
) -> TrainSet:
    """Encode all images of a world, and new captions of them.

    Args:
        vae: encodes the images.
        text_encoders: encode the captions.
        writer: writes the captions.
        world: N images.
        generator: of the captions, on the device of the images.
        captions: captions per image.
        batch: images at a time.
    """
    count = len(world)
    tensors: dict[str, Tensor] = {}
    for rows in torch.arange(count, device=world.images.device).split(batch):
        for name, values in _encode_rows(
            vae, text_encoders, writer, world, generator, captions, rows
        ).items():
            if name not in tensors:
                tensors[name] = values.new_zeros(count, *values.shape[1:])
            tensors[name][rows] = values
    return TrainSet(**tensors, size=world.images.shape[-1])


def _encode_rows(
    vae: PatchAutoencoderKL,
    text_encoders: TextEncoders,
    writer: CaptionWriter,
    world: World,
    generator: torch.Generator,
    captions: int,
    rows: Tensor,
) -> dict[str, Tensor]:
    """Return the tensors of a `TrainSet` for some rows."""
    images, masks, _ = world.rows(rows)
    latents = encode(vae, images)
    scenes = world.scenes[rows]
    tokens = torch.stack([writer.write(scenes, generator) for _ in range(captions)], 1)
    text = text_encoders(tokens.flatten(0, 1))
    return {
        "latents": latents.half(),
        "faces": avg_pool2d(masks, images.shape[-1] // latents.shape[-1]).half(),
        "tokens": tokens.to(torch.uint8),
        "embeds": text.embeds.bfloat16().unflatten(0, (-1, captions)),
        "pooled": text.pooled.bfloat16().unflatten(0, (-1, captions)),
    }
