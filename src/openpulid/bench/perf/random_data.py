"""Random training data: batches of noise, and a face in every image."""

from __future__ import annotations

import torch
from torch import Tensor

from openpulid.faces.align import TEMPLATE
from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.face import Face
from openpulid.faces.miniature import RECOGNITION_MODELS
from openpulid.methods.level_mapper import NUM_LEVELS
from openpulid.methods.pulid import PuLID, PuLIDFlux
from openpulid.training import StepRNG
from openpulid.training.pulid import BaseModel, Batch


class RandomPeople:
    """A `training.pulid.batch.BatchSource` of noise.

    Args:
        base: the base model.
        adapter: the adapter, whose encoder gives the widths of the features.
        size: batch size.
        tokens: number of tokens of the vision encoder.
        pixels: width and height of the images.
    """

    def __init__(
        self,
        base: BaseModel,
        adapter: PuLID | PuLIDFlux,
        size: int,
        tokens: int,
        pixels: int | None,
    ) -> None:
        self.base = base
        self.size = size
        self.tokens = tokens
        self.pixels = pixels
        self.width = adapter.encoder.config["width"]
        self.hidden_width = adapter.encoder.config["vit_dim"]

    def batch(self, rng: StepRNG) -> Batch:
        """Draw a batch of random latents, features and images."""
        latents = rng.randn((self.size, *self.base.latent_shape(self.pixels)), "latents")
        hidden = [
            rng.randn((self.size, self.tokens, self.hidden_width), f"hidden.{level}")
            for level in range(NUM_LEVELS)
        ]
        images = rng.rand((self.size, 3, 128, 128), "pictures")
        embeddings = rng.randn((self.size, self.width), "id")
        return Batch(latents, None, ["portrait"] * self.size, embeddings, hidden, images)


def random_faces(device: torch.device) -> FaceEmbedder:
    """Return an embedder that sees a face in every image, with random recognition weights."""

    def detect(images: Tensor) -> list[Face | None]:
        side = images.shape[-1]
        box = torch.tensor([0.0, 0.0, side, side])
        mask = torch.ones(1, side, side)
        return [Face(image, box, TEMPLATE * side, 1.0, mask) for image in images]

    return FaceEmbedder(detect, RECOGNITION_MODELS["encoder"]().to(device))
