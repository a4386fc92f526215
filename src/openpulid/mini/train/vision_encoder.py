"""Training and examination of the identity encoder's vision tower: gray faces on white, and who they are.

What the encoder reads are five hidden levels, so every one of them must say what a face looks like: a head on each reads
the facial values, and trains with the tower only. The last embedding also tells people apart, and sits beside CLIP's
sentences, as that of EVA-CLIP does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss
from transformers import CLIPTextModelWithProjection

from openpulid.faces.align import TEMPLATE, similarity_transform, warp_images
from openpulid.faces.preprocess import gray_on_white
from openpulid.identity.eva_clip import LEVELS, VisionEncoder
from openpulid.io.image_grid import image_grid, to_pil
from openpulid.mini.data.augment import augment, compose_affine, dilate, random_affine
from openpulid.mini.data.captions import Captions
from openpulid.mini.train.clip import EMBEDDING, contrast, embed_texts
from openpulid.mini.train.recognition import FACIAL_COLUMNS, MarginHead, ValueHead, faces_of
from openpulid.training.rng import StepRNG, generator_for
from openpulid.world import Person, Scene, render
from openpulid.world.dataset import WorldDataset


def build_tower(size: int = 64, width: int = 96, depth: int = 10) -> VisionEncoder:
    """The vision tower of the miniature: EVA with heads of 32 and five hidden levels."""
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
    """Reads the facial values out of each hidden level, so that each carries fine detail; trains with the tower only.

    As the identity encoder will read them: the class token, and the mean over the patches of a small network.
    """

    def __init__(self, width: int, values: int, inner: int = 64) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(LEVELS))
        self.patches = nn.ModuleList(
            nn.Sequential(nn.Linear(width, inner), nn.GELU()) for _ in range(LEVELS)
        )
        self.reads = nn.ModuleList(nn.Linear(width + inner, values) for _ in range(LEVELS))

    def forward(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Five (B, 1 + N, D) -> five (B, values), about 0 to 1."""
        found = []
        for level, norm, patches, read in zip(
            hidden, self.norms, self.patches, self.reads, strict=True
        ):
            level = norm(level)
            found.append(
                read(torch.cat([level[:, 0], patches(level[:, 1:]).mean(1)], 1)).float() + 0.5
            )
        return found


class VisionEncoderTask:
    """Trains a `VisionEncoder`; a `training.loop.Task`.

    Args:
        tower: from `build_tower`.
        clip: its text tower, frozen, says where a picture's sentence lies.
        data, captions: training pictures and their sentences.
        held_out: pictures of others.
    """

    def __init__(
        self,
        tower: VisionEncoder,
        clip: CLIPTextModelWithProjection,
        data: WorldDataset,
        captions: Captions,
        held_out: WorldDataset | None = None,
        batch: int = 64,
    ) -> None:
        values, width, out = (
            len(FACIAL_COLUMNS),
            tower.config["embed_dim"],
            tower.config["num_classes"],
        )
        self.tower, self.clip = tower, clip
        self.data, self.captions, self.held_out = data, captions, held_out
        self.batch = batch
        self.heads = nn.ModuleDict({
            "person": MarginHead(int(data.people.max()) + 1, out),
            "facial": ValueHead(out, values),
            "levels": LevelHeads(width, values),
            "words": nn.Linear(out, EMBEDDING),
        })  # fmt: skip

    def modules(self) -> Mapping[str, nn.Module]:
        return {"tower": self.tower, "heads": self.heads}

    def losses(self, draw: StepRNG) -> Mapping[str, Tensor]:
        rows = draw.indices(len(self.data), self.batch)
        variants = draw.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        device = next(self.tower.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, masks, landmarks = faces_of(self.data, rows.numpy(), device)
            generator = generator_for(draw.seed, draw.step, draw.rank)
            faces = tower_crops(images, masks, landmarks, self.tower.img_size, generator)
        words = embed_texts(self.clip, self.captions.rows(rows, variants))
        people = torch.from_numpy(self.data.people[rows.numpy()]).to(device)
        values = torch.from_numpy(self.data.vectors[rows.numpy()][:, FACIAL_COLUMNS]).to(device)
        embedding, hidden = self.tower(self.tower.prepare(faces))
        levels = [smooth_l1_loss(read, values, beta=0.1) for read in self.heads["levels"](hidden)]
        return {
            "people": 0.1 * self.heads["person"](embedding, people, draw.step),
            "values": 5.0 * smooth_l1_loss(self.heads["facial"](embedding), values, beta=0.1),
            "levels": 5.0 * torch.stack(levels).mean(),
            "words": 0.2 * contrast(self.heads["words"](embedding), words, torch.tensor(20.0)),
        }

    def validate(self) -> Mapping[str, float]:
        return tower_figures(self.tower, self.heads, self.held_out) if self.held_out else {}

    def sheet(self) -> Image.Image | None:
        return as_read(self.tower, self.heads, self.held_out) if self.held_out else None


@torch.no_grad()
def as_read(
    tower: VisionEncoder, heads: nn.ModuleDict, data: WorldDataset, count: int = 8
) -> Image.Image:
    """A row for each of some held-out people: the picture, what the tower sees of it, the person drawn from the values
    read out of the last hidden level (in the true skin), and the person as they are."""
    device = next(tower.parameters()).device
    rows = np.linspace(0, len(data) - 1, count).astype(np.int64)
    images, masks, landmarks = faces_of(data, rows, device)
    crops = tower_crops(images, masks, landmarks, tower.img_size)
    _, hidden = tower(tower.prepare(crops))
    values = torch.from_numpy(data.vectors[rows]).clone()
    true = [Person.from_vector(vector) for vector in values.tolist()]
    values[:, FACIAL_COLUMNS] = heads["levels"](hidden)[-1].float().cpu().clamp(0, 1)
    read = [Person.from_vector(vector) for vector in values.tolist()]
    drawn = [
        to_pil(render(people, [Scene()] * count, size=96, device="cpu").image)
        for people in (read, true)
    ]
    shown = [to_pil(images), to_pil(crops), *drawn]
    return image_grid(list(zip(*shown, strict=True)), 144)


def tower_crops(
    images: Tensor,
    masks: Tensor,
    landmarks: Tensor,
    size: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """(B, 3, size, size) gray faces on white, as `MiniExtractor` shows them; moved and damaged with a generator.

    Args:
        images: (B, 3, H, W) in [0, 1]; masks (B, 1, H, W) one on the face; landmarks (B, 5, 2) pixels.
    """
    matrix = similarity_transform(landmarks, TEMPLATE * size)
    if generator is None:
        crops = warp_images(torch.cat([images, masks], 1), matrix, size)
        return gray_on_white(crops[:, :3], crops[:, 3:])
    jitter = random_affine(len(images), size, generator, turn=0.06, grow=0.05, shift=0.02)
    crops = warp_images(torch.cat([images, masks], 1), compose_affine(matrix, jitter), size)
    light = 0.75 + 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    return gray_on_white(
        augment((crops[:, :3] * light).clamp(0, 1), generator), dilate(crops[:, 3:], generator)
    )


@torch.no_grad()
def tower_figures(
    tower: VisionEncoder, heads: nn.ModuleDict, data: WorldDataset, most: int = 512
) -> dict[str, float]:
    """Mean error of the facial values of people nobody trained on (chance is 0.25): `values` from the embedding, `level.K`
    from hidden level K."""
    device = next(tower.parameters()).device
    rows = np.linspace(0, len(data) - 1, min(most, len(data))).astype(np.int64)
    errors = []
    for part in np.array_split(rows, max(1, len(rows) // 64)):
        faces = tower_crops(*faces_of(data, part, device), tower.img_size)
        wanted = torch.from_numpy(data.vectors[part][:, FACIAL_COLUMNS]).to(device)
        embedding, hidden = tower(tower.prepare(faces))
        reads = [heads["facial"](embedding), *heads["levels"](hidden)]
        errors.append(torch.stack([(read - wanted).abs().mean() for read in reads]).cpu())
    values, *levels = torch.stack(errors).mean(0).tolist()
    return {"values": values, **{f"level.{k}": error for k, error in enumerate(levels)}}
