"""Training of the miniature's face latents: a generator and an encoder, as one autoencoder.

W+ Adapter reads latents of StyleGAN2 that e4e computes. The miniature has neither, so its latent
space comes from reconstruction: the generator is not a GAN, and its latents have no distribution
that new faces could be drawn from. The encoder's form, the penalty on offsets and the loss of a
face recognition model are those of e4e (arXiv 2102.02766).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from openpulid.identity.face_latents import FaceLatentEncoder
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.mini.evaluation.reconstructions import measure_reconstructions, reconstruct
from openpulid.mini.models import FaceGenerator
from openpulid.mini.train.autoencoder import image_distances, pixel_weights
from openpulid.mini.train.face_crops import LANDMARKS, compare_faces, load_crops
from openpulid.training import StepRNG, generator_for
from openpulid.world import WorldDataset

SLOPES_WEIGHT = 0.5
IDENTITY_WEIGHT = 0.2
OFFSET_WEIGHT = 0.01


class FaceLatentsTask:
    """Trains encoder and generator together; a `training.trainer.Task`.

    Args:
        encoder, generator: untrained, with latents of one width.
        recognition: frozen face recognition model of the identity loss.
        data: datasets of training images; each gives the same number of images to a step.
        held_out: images of held-out people; None disables validation.
        batch: images per step.
    """

    def __init__(
        self,
        encoder: FaceLatentEncoder,
        generator: FaceGenerator,
        recognition: nn.Module,
        data: Sequence[WorldDataset],
        held_out: WorldDataset | None = None,
        batch: int = 16,
    ) -> None:
        self.encoder = encoder.to(memory_format=torch.channels_last)
        self.generator = generator.to(memory_format=torch.channels_last)
        frozen = recognition.eval().requires_grad_(False)
        self.recognition = frozen.to(memory_format=torch.channels_last)
        self.data = data
        self.held_out = held_out
        self.batch = batch

    def modules(self) -> Mapping[str, nn.Module]:
        """Return encoder and generator."""
        return {"encoder": self.encoder, "generator": self.generator}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the losses of reconstruction, identity and offsets of a random batch."""
        faces, masks = self._sample_faces(rng)
        first, offsets = self.encoder.encode_parts(faces)
        decoded = self.generator(torch.cat([first, first + offsets], 1))
        landmarks = LANDMARKS.to(masks).expand(len(masks), -1, -1)
        pixels, slopes = image_distances(decoded, 2 * faces - 1, pixel_weights(masks, landmarks))
        similarity = compare_faces(self.recognition, faces, decoded / 2 + 0.5, masks)
        return {
            "pixels": pixels,
            "slopes": SLOPES_WEIGHT * slopes,
            "identity": IDENTITY_WEIGHT * (1 - similarity).mean(),
            "offsets": OFFSET_WEIGHT * offsets.square().mean(),
        }

    def validate(self) -> Mapping[str, float]:
        """Measure the reconstructions of held-out faces."""
        if self.held_out is None:
            return {}
        return measure_reconstructions(self.encoder, self.generator, self.held_out, max_images=512)

    def sheet(self) -> Image.Image | None:
        """Draw held-out faces, each row above its reconstructions."""
        if self.held_out is None:
            return None
        rows = np.linspace(0, len(self.held_out) - 1, 24).astype(np.int64)
        faces, _ = load_crops(self.held_out, rows, self.encoder.device)
        originals = to_pil(faces)
        decoded = to_pil(reconstruct(self.encoder, self.generator, faces))
        grid = []
        for start in (0, 8, 16):
            grid.append(originals[start : start + 8])
            grid.append(decoded[start : start + 8])
        return image_grid(grid, 128)

    def _sample_faces(self, rng: StepRNG) -> tuple[Tensor, Tensor]:
        """Sample crops on white (B, 3, S, S), slightly transformed, and their masks."""
        generator = generator_for(rng.seed, rng.step, rng.rank)
        count = self.batch // len(self.data)
        parts = []
        for index, data in enumerate(self.data):
            rows = rng.indices(len(data), count, f"data{index}").numpy()
            parts.append(load_crops(data, rows, self.encoder.device, generator))
        faces, masks = zip(*parts, strict=True)
        images = torch.cat(faces).contiguous(memory_format=torch.channels_last)
        return images, torch.cat(masks)
