"""Training and evaluation of the identity encoder's vision encoder on gray faces on white.

The identity encoder uses five hidden levels, so each of them must represent the face: a head on
each level, used only in training, predicts the facial values. The final embedding also separates
people, and is aligned with CLIP's caption embeddings, as that of EVA-CLIP is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from transformers import CLIPTextModelWithProjection

from openpulid.faces.align import crop_faces, gray_on_white
from openpulid.faces.augment import degrade, dilate, random_affine
from openpulid.identity.eva_clip import LEVELS, VisionEncoder
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.mini.data import Captions, load_faces
from openpulid.mini.train.clip import EMBEDDING_DIM, contrastive_loss, embed_texts
from openpulid.mini.train.recognition import FACIAL_COLUMNS, MarginHead, ValueHead
from openpulid.training import StepRNG, generator_for
from openpulid.world import Person, Scene, WorldDataset, render


def build_vision_encoder(size: int = 64, width: int = 96, depth: int = 10) -> VisionEncoder:
    """Build the miniature's EVA vision encoder with random weights.

    Args:
        size: image size in pixels, a multiple of 8.
        width: hidden size, a multiple of 32, the size of an attention head.
        depth: number of transformer blocks, from which five hidden levels are taken.
    """
    return VisionEncoder(
        img_size=size,
        patch_size=8,
        embed_dim=width,
        depth=depth,
        num_heads=width // 32,
        num_classes=64,
        ref_grid=None,
    )


class LevelHeads(nn.Module):
    """Predicts the facial values from each hidden level, so that each contains fine detail.

    The input is what the identity encoder uses: the class token, and the mean of a small network
    over the patches. The heads are used only in training.
    """

    def __init__(self, width: int, values: int, inner: int = 64) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(LEVELS))
        self.patches = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.GELU()) for _ in range(LEVELS)
        )
        self.outputs = nn.ModuleList(nn.Linear(width + inner, values) for _ in range(LEVELS))

    def forward(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Predict values (B, V), about 0 to 1, from each of five hidden levels (B, 1 + N, D)."""
        predictions = []
        for level, norm, patches, output in zip(
            hidden, self.norms, self.patches, self.outputs, strict=True
        ):
            level = norm(level)
            features = torch.cat([level[:, 0], patches(level[:, 1:]).mean(1)], 1)
            predictions.append(output(features).float() + 0.5)
        return predictions


class VisionEncoderTask:
    """Trains a `VisionEncoder`; a `training.trainer.Task`.

    Args:
        vision_encoder: from `build_vision_encoder`.
        clip: frozen text encoder whose caption embeddings are the target of the alignment.
        data: training images.
        captions: captions of `data`.
        held_out: images of held-out people; None disables validation.
        batch: images per step.
    """

    def __init__(
        self,
        vision_encoder: VisionEncoder,
        clip: CLIPTextModelWithProjection,
        data: WorldDataset,
        captions: Captions,
        held_out: WorldDataset | None = None,
        batch: int = 64,
    ) -> None:
        values = len(FACIAL_COLUMNS)
        width = vision_encoder.config["embed_dim"]
        dim = vision_encoder.config["num_classes"]
        self.vision_encoder = vision_encoder
        self.clip = clip
        self.data = data
        self.captions = captions
        self.held_out = held_out
        self.batch = batch
        self.heads = nn.ModuleDict(
            {
                "person": MarginHead(int(data.people.max()) + 1, dim),
                "facial": ValueHead(dim, values),
                "levels": LevelHeads(width, values),
                "captions": nn.Linear(dim, EMBEDDING_DIM),
            }
        )

    def modules(self) -> Mapping[str, nn.Module]:
        """Return the vision encoder and its training heads."""
        return {"vision_encoder": self.vision_encoder, "heads": self.heads}

    def losses(self, rng: StepRNG) -> Mapping[str, Tensor]:
        """Compute the losses of people, facial values (embedding and levels) and captions."""
        rows = rng.indices(len(self.data), self.batch)
        variants = rng.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        device = next(self.vision_encoder.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, masks, landmarks = load_faces(self.data, rows.numpy(), device)
            generator = generator_for(rng.seed, rng.step, rng.rank)
            faces = crop_gray_faces(
                images, masks, landmarks, self.vision_encoder.img_size, generator
            )
        captions = embed_texts(self.clip, self.captions.rows(rows, variants))
        people = torch.from_numpy(self.data.people[rows.numpy()]).to(device)
        values = torch.from_numpy(self.data.vectors[rows.numpy()][:, FACIAL_COLUMNS]).to(device)
        embedding, hidden = self.vision_encoder(self.vision_encoder.prepare(faces))
        level_losses = [
            smooth_l1_loss(prediction, values, beta=0.1)
            for prediction in self.heads["levels"](hidden)
        ]
        projected = self.heads["captions"](embedding)
        return {
            "people": 0.1 * self.heads["person"](embedding, people, rng.step),
            "values": 5.0 * smooth_l1_loss(self.heads["facial"](embedding), values, beta=0.1),
            "levels": 5.0 * torch.stack(level_losses).mean(),
            "captions": 0.2 * contrastive_loss(projected, captions, torch.tensor(20.0)),
        }

    def validate(self) -> Mapping[str, float]:
        """Measure the errors of the facial values of held-out people."""
        if self.held_out is None:
            return {}
        return evaluate_vision_encoder(self.vision_encoder, self.heads, self.held_out)

    def sheet(self) -> Image.Image | None:
        """Draw held-out people with the values predicted for them."""
        if self.held_out is None:
            return None
        return draw_predictions(self.vision_encoder, self.heads, self.held_out)


@torch.no_grad()
def draw_predictions(
    vision_encoder: VisionEncoder, heads: nn.ModuleDict, data: WorldDataset, count: int = 8
) -> Image.Image:
    """Draw held-out people with the values predicted from the last hidden level.

    Each row contains an image, the input of the vision encoder, the person rendered from the
    predicted facial values (skin and hair are the true ones), and the true person.

    Args:
        vision_encoder: the network.
        heads: heads of a `VisionEncoderTask`.
        data: images of held-out people.
        count: number of rows.
    """
    device = next(vision_encoder.parameters()).device
    rows = np.linspace(0, len(data) - 1, count).astype(np.int64)
    images, masks, landmarks = load_faces(data, rows, device)
    crops = crop_gray_faces(images, masks, landmarks, vision_encoder.img_size)
    _, hidden = vision_encoder(vision_encoder.prepare(crops))
    vectors = torch.from_numpy(data.vectors[rows]).clone()
    true_people = [Person.from_vector(vector) for vector in vectors.tolist()]
    vectors[:, FACIAL_COLUMNS] = heads["levels"](hidden)[-1].float().cpu().clamp(0, 1)
    predicted_people = [Person.from_vector(vector) for vector in vectors.tolist()]
    rendered = [
        to_pil(render(people, [Scene()] * count, size=96, device="cpu").image)
        for people in (predicted_people, true_people)
    ]
    columns = [to_pil(images), to_pil(crops), *rendered]
    return image_grid(list(zip(*columns, strict=True)), 144)


def crop_gray_faces(
    images: Tensor,
    masks: Tensor,
    landmarks: Tensor,
    size: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Crop faces as `MiniExtractor` does: gray, aligned, on white.

    Args:
        images: (B, 3, H, W) in [0, 1].
        masks: (B, 1, H, W), one on the face.
        landmarks: (B, 5, 2) in pixels.
        size: width and height of the crops in pixels.
        generator: if not None, crops are randomly transformed and degraded.

    Returns:
        (B, 3, size, size) in [0, 1].
    """
    if generator is None:
        return gray_on_white(*crop_faces(images, masks, landmarks, size))
    jitter = random_affine(len(images), size, generator, turn=0.06, grow=0.05, shift=0.02)
    crops, crop_masks = crop_faces(images, masks, landmarks, size, jitter)
    light = 0.75 + 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    faces = degrade((crops * light).clamp(0, 1), generator)
    return gray_on_white(faces, dilate(crop_masks, generator))


@torch.no_grad()
def evaluate_vision_encoder(
    vision_encoder: VisionEncoder, heads: nn.ModuleDict, data: WorldDataset, limit: int = 512
) -> dict[str, float]:
    """Measure the mean absolute error of the facial values of held-out people.

    Args:
        vision_encoder: the network.
        heads: heads of a `VisionEncoderTask`.
        data: images of held-out people.
        limit: maximum number of images, spread evenly over the data.

    Returns:
        `values`, the error from the embedding, and `level.K`, the error from hidden level K; chance
        is 0.25.
    """
    device = next(vision_encoder.parameters()).device
    rows = np.linspace(0, len(data) - 1, min(limit, len(data))).astype(np.int64)
    errors = []
    for chunk in np.array_split(rows, max(1, len(rows) // 64)):
        images, masks, landmarks = load_faces(data, chunk, device)
        faces = crop_gray_faces(images, masks, landmarks, vision_encoder.img_size)
        targets = torch.from_numpy(data.vectors[chunk][:, FACIAL_COLUMNS]).to(device)
        embedding, hidden = vision_encoder(vision_encoder.prepare(faces))
        predictions = [heads["facial"](embedding), *heads["levels"](hidden)]
        chunk_errors = [(prediction - targets).abs().mean() for prediction in predictions]
        errors.append(torch.stack(chunk_errors).cpu())
    values, *levels = torch.stack(errors).mean(0).tolist()
    return {"values": values, **{f"level.{k}": error for k, error in enumerate(levels)}}
