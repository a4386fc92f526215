"""What reads words and looks at pictures in the miniature, trained in one run on pictures and their sentences.

- a small `transformers.CLIPModel`, whose text tower is also SDXL's second text encoder;
- SDXL's first text encoder, a smaller `CLIPTextModel`, against the same picture embeddings;
- the vision tower of the identity encoder, which sees gray faces on white only: who it is, every facial value out of every
  hidden level, and what the sentence says of the face;
- the attribute reader, the judge of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, smooth_l1_loss
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from openpulid.faces.align import TEMPLATE, similarity, warp
from openpulid.faces.parse import gray_on_white
from openpulid.identity.vision import CLIP_MEAN, CLIP_STD, LEVELS, VisionTower
from openpulid.mini.augment import after, damaged, moved, swollen
from openpulid.mini.captions import Captions, token_ids
from openpulid.mini.reader import AttributeReader
from openpulid.mini.recognisers import FACIAL_COLUMNS, MarginHead, ValueHead, faces_of
from openpulid.training.data import Draw, generator_for
from openpulid.world import ATTRIBUTES
from openpulid.world.dataset import WorldDataset

EMBEDDING = 128
"""Width of what pictures and sentences are compared in, and SDXL's pooled text."""


def text_config(tokenizer: Tokenizer, width: int, layers: int = 3) -> CLIPTextConfig:
    """A text tower over the closed vocabulary; heads of 32."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length,
        hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers, num_attention_heads=width // 32,
        projection_dim=EMBEDDING, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def build_clip(tokenizer: Tokenizer, size: int = 96, patch: int = 12, width: int = 128, layers: int = 4) -> CLIPModel:
    """CLIP for `size` px pictures with random weights."""
    vision = CLIPVisionConfig(
        image_size=size, patch_size=patch, hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 32, projection_dim=EMBEDDING, hidden_act="gelu",
    )  # fmt: skip
    text = text_config(tokenizer, width=128)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBEDDING)
    return CLIPModel(config)


def build_first_text(tokenizer: Tokenizer, width: int = 64) -> CLIPTextModelWithProjection:
    """SDXL's first text encoder, with a projection that serves its training alone."""
    return CLIPTextModelWithProjection(text_config(tokenizer, width))


def build_tower(size: int = 64, width: int = 96, depth: int = 10) -> VisionTower:
    """The vision tower of the miniature: EVA with heads of 32 and five hidden levels."""
    return VisionTower(
        img_size=size, patch_size=8, embed_dim=width, depth=depth, num_heads=width // 32, num_classes=64, ref_grid=None
    )


class LevelHeads(nn.Module):
    """Reads the facial values out of each hidden level, so that each carries fine detail; trains with the tower only."""

    def __init__(self, width: int, values: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(2 * width), nn.Linear(2 * width, values)) for _ in range(LEVELS)
        )

    def forward(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Five (B, 1 + N, D) -> five (B, values), about 0 to 1, from the class token and the mean of the patches."""
        seen = [torch.cat([level[:, 0], level[:, 1:].mean(1)], 1) for level in hidden]
        return [head(part).float() + 0.5 for head, part in zip(self.heads, seen, strict=True)]


class AttributeHeads(nn.Module):
    """One linear head per attribute on an embedding; teaches the picture tower what sentences speak of."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(classes)) for name, classes in ATTRIBUTES.items()})

    def forward(self, seen: Tensor) -> dict[str, Tensor]:
        """(B, D) -> attribute name -> (B, classes)."""
        return {name: head(seen).float() for name, head in self.heads.items()}


@dataclass
class Readers:
    """The networks of this part: those that are shipped, and the heads that only help to train them."""

    clip: CLIPModel
    text: CLIPTextModelWithProjection
    tower: VisionTower
    reader: AttributeReader
    heads: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    @classmethod
    def build(cls, tokenizer: Tokenizer, people: int, **sizes: int) -> Readers:
        """With random weights; `sizes` are those of `build_clip`."""
        clip, tower = build_clip(tokenizer, **sizes), build_tower()
        values, width = len(FACIAL_COLUMNS), tower.config["embed_dim"]
        heads = nn.ModuleDict({
            "person": MarginHead(people, tower.config["num_classes"]),
            "facial": ValueHead(tower.config["num_classes"], values),
            "levels": LevelHeads(width, values),
            "words": nn.Linear(tower.config["num_classes"], EMBEDDING),
            "scene": AttributeHeads(EMBEDDING),
        })  # fmt: skip
        return cls(clip, build_first_text(tokenizer), tower, AttributeReader(size=clip.config.vision_config.image_size), heads)

    def modules(self) -> dict[str, nn.Module]:
        return {"clip": self.clip, "text": self.text, "tower": self.tower, "reader": self.reader, "heads": self.heads}


class ReadersTask:
    """Trains all of them, each with its own loss; a `training.loop.Task`.

    Args:
        readers: from `Readers.build`.
        tokenizer: the sentences'.
        data, captions: training pictures and their sentences.
        held_out: pictures of others.
        batch: pictures per step; each is among so many others for CLIP.
    """

    def __init__(
        self,
        readers: Readers,
        tokenizer: Tokenizer,
        data: WorldDataset,
        captions: Captions,
        held_out: WorldDataset | None = None,
        batch: int = 96,
    ) -> None:
        self.readers, self.tokenizer = readers, tokenizer
        self.data, self.captions, self.held_out, self.batch = data, captions, held_out, batch
        readers.reader.to(memory_format=torch.channels_last)

    def modules(self) -> Mapping[str, nn.Module]:
        return self.readers.modules()

    def losses(self, draw: Draw) -> Mapping[str, Tensor]:
        rows = draw.indices(len(self.data), self.batch)
        variants = draw.randint(self.captions.tokens.shape[1], rows.shape, "variants")
        device = next(self.readers.reader.parameters()).device
        tokens = self.captions.rows(rows, variants).to(device)
        generator = generator_for(draw.seed, draw.step, draw.rank)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            images, masks, landmarks = faces_of(self.data, rows.numpy(), device)
            faces = tower_crops(images, masks, landmarks, self.readers.tower.img_size, generator)
            images = damaged(images, generator)
        attributes = torch.from_numpy(self.data.attributes[rows.numpy()].astype(np.int64)).to(device)
        words, losses = self._clip(images, tokens, attributes)
        people = torch.from_numpy(self.data.people[rows.numpy()]).to(device)
        values = torch.from_numpy(self.data.vectors[rows.numpy()][:, FACIAL_COLUMNS]).to(device)
        return {**losses, **self._tower(faces, words, people, values, min(1.0, draw.step / 400))}

    def _clip(self, images: Tensor, tokens: Tensor, attributes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        r = self.readers
        both = r.clip(input_ids=tokens, pixel_values=clip_pixels(images))
        first = r.text(input_ids=tokens).text_embeds
        scale = r.clip.logit_scale.clamp(max=4.6).exp()
        heads = r.heads["scene"](both.image_embeds.float() * EMBEDDING**0.5)
        reading = r.reader(images.contiguous(memory_format=torch.channels_last))
        return both.text_embeds.detach(), {
            "clip": contrast(both.image_embeds, both.text_embeds, scale),
            "text": contrast(both.image_embeds.detach(), first, scale.detach()),
            "seen": 0.5 * attribute_loss(heads, attributes),
            "reader": attribute_loss(reading, attributes),
        }

    def _tower(self, faces: Tensor, words: Tensor, people: Tensor, values: Tensor, ramp: float) -> dict[str, Tensor]:
        tower, heads = self.readers.tower, self.readers.heads
        embedding, hidden = tower(tower.prepare(faces))
        levels = torch.stack([smooth_l1_loss(read, values, beta=0.1) for read in heads["levels"](hidden)])
        return {
            "people": 0.25 * heads["person"](embedding, people, ramp),
            "values": 2.0 * smooth_l1_loss(heads["facial"](embedding), values, beta=0.1),
            "levels": 2.0 * levels.mean(),
            "words": 0.5 * contrast(heads["words"](embedding), words, torch.tensor(20.0)),
        }

    def validate(self) -> Mapping[str, float]:
        return figures(self.readers, self.tokenizer, self.held_out) if self.held_out else {}

    def sheet(self) -> Image.Image | None:
        return None


def contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's loss (Radford et al. 2021): each of B pictures (B, D) among the B sentences (B, D), and the reverse."""
    with torch.autocast(images.device.type, enabled=False):
        logits = scale.float().to(images.device) * normalize(images.float()) @ normalize(texts.float()).T
        right = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2


def attribute_loss(scores: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """Cross-entropy, mean over the attributes; `wanted` (B, A) in the order of `ATTRIBUTES`, -1 where nothing can be seen."""
    losses = []
    for column, name in enumerate(ATTRIBUTES):
        visible = (wanted[:, column] >= 0).sum().clamp(min=1)
        losses.append(cross_entropy(scores[name], wanted[:, column], ignore_index=-1, reduction="sum") / visible)
    return torch.stack(losses).mean()


def clip_pixels(images: Tensor) -> Tensor:
    """(B, 3, S, S) in [0, 1] -> as CLIP's towers see them."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def tower_crops(
    images: Tensor, masks: Tensor, landmarks: Tensor, size: int, generator: torch.Generator | None = None
) -> Tensor:
    """(B, 3, size, size) gray faces on white, as `FeatureExtractor` shows them; moved and damaged with a generator.

    Args:
        images: (B, 3, H, W) in [0, 1]; masks (B, 1, H, W) one on the face; landmarks (B, 5, 2) pixels.
    """
    matrix = similarity(landmarks, TEMPLATE * size)
    if generator is None:
        crops = warp(torch.cat([images, masks], 1), matrix, size)
        return gray_on_white(crops[:, :3], crops[:, 3:])
    jitter = moved(len(images), size, generator, turn=0.06, grow=0.05, shift=0.02)
    crops = warp(torch.cat([images, masks], 1), after(matrix, jitter), size)
    light = 0.75 + 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator).to(images.device)
    return gray_on_white(damaged((crops[:, :3] * light).clamp(0, 1), generator), swollen(crops[:, 3:], generator))


@torch.no_grad()
def loudened(text: nn.Module, projection: nn.Linear, tokens: Tensor) -> None:
    """Scales a text tower, in place, so that what SDXL reads of it (penultimate hidden states, pooled) has mean square 1.

    CLIP's embeddings stay in their directions: its blocks normalise what they read, so all that is added up along the way can
    be scaled together. A U-Net learns faster from numbers of usual size than from CLIP's small initial ones.

    Args:
        text: a CLIP text transformer; tokens: (B, L) sentences to measure on.
    """
    said = text(input_ids=tokens, output_hidden_states=True)
    loudness = 1 / said.hidden_states[-2].float().square().mean().sqrt()
    embeddings = text.embeddings
    added = [embeddings.token_embedding.weight, embeddings.position_embedding.weight]
    for layer in text.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            added += [linear.weight, linear.bias]
    for weight in added:
        weight *= loudness
    projection.weight /= projection(said.pooler_output).float().square().mean().sqrt()


@torch.no_grad()
def embed_images(clip: CLIPModel, images: Tensor) -> Tensor:
    """(B, 3, S, S) in [0, 1] -> (B, D) of length 1."""
    pooled = clip.vision_model(pixel_values=clip_pixels(images.to(clip.device))).pooler_output
    return normalize(clip.visual_projection(pooled).float(), dim=-1)


@torch.no_grad()
def embed_texts(clip: CLIPModel, tokens: Tensor) -> Tensor:
    """(B, L) tokens -> (B, D) of length 1."""
    pooled = clip.text_model(input_ids=tokens.to(clip.device)).pooler_output
    return normalize(clip.text_projection(pooled).float(), dim=-1)


@torch.no_grad()
def figures(readers: Readers, tokenizer: Tokenizer, data: WorldDataset, most: int = 512, among: int = 64) -> dict[str, float]:
    """On people nobody trained on.

    `top1`: how often CLIP finds a picture's own sentence among 64; `top1_text`: the first text encoder; `attributes` and
    `attributes_least`: how often the reader is right, mean over the attributes and the worst of them; `values`: mean error
    of the facial values read from the tower's embedding, and `levels` from the worst of its levels (chance is 0.25).
    """
    device = readers.clip.device
    generator = generator_for("clip figures")
    rows = torch.randperm(len(data), generator=generator)[: most // among * among]
    tokens = token_ids(tokenizer, [data.prompt(row, generator) for row in rows.tolist()]).to(device)
    hits: dict[str, list[Tensor]] = {"top1": [], "top1_text": []}
    errors, right = [], []
    for part in range(0, len(rows), among):
        chosen, said = rows[part : part + among].numpy(), tokens[part : part + among]
        images, masks, landmarks = faces_of(data, chosen, device)
        seen = embed_images(readers.clip, images)
        for name, words in (("top1", embed_texts(readers.clip, said)), ("top1_text", readers.text(input_ids=said).text_embeds)):
            best = (seen @ normalize(words.float(), dim=-1).T).argmax(1)
            hits[name].append((best == torch.arange(len(best), device=device)).float())
        right.append(correct(readers.reader(images), torch.from_numpy(data.attributes[chosen].astype(np.int64)).to(device)))
        errors.append(_value_errors(readers, tower_crops(images, masks, landmarks, readers.tower.img_size), data.vectors[chosen]))
    read = accuracy(torch.cat(right))
    least = torch.stack(errors).mean(0)
    return {
        **{name: torch.cat(values).mean().item() for name, values in hits.items()},
        "attributes": sum(read.values()) / len(read),
        "attributes_least": min(read.values()),
        "values": least[0].item(),
        "levels": least[1:].max().item(),
    }


def _value_errors(readers: Readers, faces: Tensor, vectors: np.ndarray) -> Tensor:
    """(1 + 5,) mean absolute errors of the facial values from the embedding and from each level."""
    embedding, hidden = readers.tower(readers.tower.prepare(faces))
    wanted = torch.from_numpy(vectors[:, FACIAL_COLUMNS]).to(faces.device)
    reads = [readers.heads["facial"](embedding), *readers.heads["levels"](hidden)]
    return torch.stack([(read - wanted).abs().mean() for read in reads]).cpu()


def correct(scores: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """(B, A) one where the best class is the wanted one, zero where it is not, NaN where nothing can be seen."""
    best = torch.stack([scores[name].argmax(-1) for name in ATTRIBUTES], 1)
    return torch.where(wanted >= 0, (best == wanted).float(), torch.nan)


def accuracy(right: Tensor) -> dict[str, float]:
    """(N, A) from `correct` -> the share per attribute that was seen at all."""
    return {name: value for name, value in zip(ATTRIBUTES, right.nanmean(0).tolist(), strict=True) if value == value}
