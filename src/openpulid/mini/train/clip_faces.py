"""Training of a vision encoder of CLIP that knows faces.

PhotoMaker and FastComposer begin with OpenAI's CLIP, which tells people apart: captions of the web
name them. The miniature's captions name nobody, and its CLIP knows no face
(benchmarks/mini-baselines.md). So these two methods begin with a copy of it that has also learned
the facial values. The CLIP of the metrics stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from openpulid.faces.augment import degrade
from openpulid.identity.eva_clip import normalize_for_clip
from openpulid.mini.data import Captions, batches, load_faces
from openpulid.mini.train.clip import contrastive_loss, embed_texts
from openpulid.mini.train.recognition import FACIAL_COLUMNS, MarginHead, ValueHead
from openpulid.training import StepRNG, generator_for
from openpulid.world import WorldDataset

CAPTION_SCALE = 20.0
"""Factor of the cosines between images and captions, as in the vision encoder's training."""


class ClipFacesTask:
    """Trains CLIP's vision encoder to know faces; a `training.trainer.Task`.

    The class token predicts the facial values and the person, with the heads and weights of
    `VisionEncoderTask`; the image embedding stays that of its caption.

    Args:
        encoder: the miniature's CLIP, which trains.
        text_encoder: the frozen text encoder of the captions.
        data: training images.
        captions: captions of `data`.
        held_out: images of held-out people; None disables validation.
        batch: images per step.
    """

    def __init__(
        self,
        encoder: CLIPVisionModelWithProjection,
        text_encoder: CLIPTextModelWithProjection,
        data: WorldDataset,
        captions: Captions,
        held_out: WorldDataset | None = None,
        batch: int = 64,
    ) -> None:
        self.encoder = encoder.requires_grad_(True)
        self.text_encoder = text_encoder
        self.data = data
        self.captions = captions
        self.held_out = held_out
        self.batch = batch
        width = encoder.config.hidden_size
        self.heads = nn.ModuleDict(
            {
                "person": MarginHead(int(data.people.max()) + 1, width),
                "facial": ValueHead(width, len(FACIAL_COLUMNS)),
            }
        )

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the vision encoder and its training heads."""
        return {"encoder": self.encoder, "heads": self.heads}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the losses of people, facial values and captions."""
        rows = rng.indices(len(self.data), self.batch)
        variants = rng.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        device = self.encoder.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, _, _ = load_faces(self.data, rows.numpy(), device)
            images = degrade(images, generator_for(rng.seed, rng.step, rng.rank))
        captions = embed_texts(self.text_encoder, self.captions.rows(rows, variants))
        people = torch.from_numpy(self.data.people[rows.numpy()]).to(device)
        values = torch.from_numpy(self.data.vectors[rows.numpy()][:, FACIAL_COLUMNS]).to(device)
        output = self.encoder(pixel_values=normalize_for_clip(images))
        token = self.encoder.vision_model.post_layernorm(output.last_hidden_state[:, 0])
        scale = torch.tensor(CAPTION_SCALE)
        return {
            "people": 0.1 * self.heads["person"](token, people, rng.step),
            "values": 5.0 * smooth_l1_loss(self.heads["facial"](token), values, beta=0.1),
            "captions": 0.2 * contrastive_loss(output.image_embeds, captions, scale),
        }

    @torch.no_grad()
    def validate(self) -> Mapping[str, float]:
        """Measure the mean absolute error of the facial values of held-out people.

        Returns:
            `values`; chance is 0.25.
        """
        if self.held_out is None:
            return {}
        errors = []
        for rows in batches(len(self.held_out), 512):
            images, _, _ = load_faces(self.held_out, rows, self.encoder.device)
            token = self.encoder.vision_model(pixel_values=normalize_for_clip(images)).pooler_output
            values = torch.from_numpy(self.held_out.vectors[rows][:, FACIAL_COLUMNS])
            errors.append((self.heads["facial"](token).cpu() - values).abs().mean(1))
        return {"values": torch.cat(errors).mean().item()}

    def sheet(self) -> Image.Image | None:
        """Draw nothing: the encoder shows no images."""
        return None
