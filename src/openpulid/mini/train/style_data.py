"""Training batches of the miniature's IP-Adapter for a style image."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpulid.identity.eva_clip import normalize_for_clip
from openpulid.mini.data import load_faces
from openpulid.mini.train.build_context import BuildContext
from openpulid.mini.train.portraits import Portraits
from openpulid.training import StepRNG
from openpulid.world import ATTRIBUTES, WorldDataset, remove_look

STYLE_ATTRIBUTES = ("style", "light", "background", "pattern")
"""Attributes that an image and its style image share."""
FALLBACK_ATTRIBUTES = ("style", "background")
"""The same where no other image shares all of them."""
SHORT_CAPTIONS = 0.5
"""Fraction of captions without style, light and background, which only the style image tells."""


class StylePairs:
    """For each image, the images of other people that look alike but for the person.

    Args:
        people: (N,) person of each image.
        attributes: (N, A) classes in the order of `ATTRIBUTES`, -1 where one is not visible.
    """

    def __init__(self, people: np.ndarray, attributes: np.ndarray) -> None:
        self.count = np.zeros(len(people), dtype=np.int64)
        self._first = np.zeros_like(self.count)
        self._own_first = np.zeros_like(self.count)
        self._own_end = np.zeros_like(self.count)
        orders = []
        for level, names in enumerate((STYLE_ATTRIBUTES, FALLBACK_ATTRIBUTES)):
            columns = attributes[:, [list(ATTRIBUTES).index(name) for name in names]]
            looks = np.unique(columns, axis=0, return_inverse=True)[1].reshape(-1)
            # images of one look are neighbors, and within them those of one person
            order = np.lexsort((people, looks))
            by_look = looks[order]
            by_person = by_look * (int(people.max()) + 1) + people[order]
            first, end = (np.searchsorted(by_look, by_look, side) for side in ("left", "right"))
            own_first, own_end = (
                np.searchsorted(by_person, by_person, side) for side in ("left", "right")
            )
            count = (end - first) - (own_end - own_first)
            is_new = (self.count[order] == 0) & (count > 0)
            rows = order[is_new]
            offset = level * len(people)
            self.count[rows] = count[is_new]
            self._first[rows] = first[is_new] + offset
            self._own_first[rows] = own_first[is_new] + offset
            self._own_end[rows] = own_end[is_new] + offset
            orders.append(order)
        self._order = np.concatenate(orders)

    def sample(self, rows: Tensor, rng: StepRNG) -> Tensor:
        """Sample an image for each row, (B,) -> (B,); an only image is its own."""
        fractions = rng.rand(rows.shape, "mates").numpy()
        row = rows.numpy()
        position = self._first[row] + (fractions * self.count[row]).astype(np.int64)
        # skip the images of the same person
        own_length = self._own_end[row] - self._own_first[row]
        position += np.where(position >= self._own_first[row], own_length, 0)
        position = np.minimum(position, len(self._order) - 1)
        return torch.from_numpy(np.where(self.count[row] > 0, self._order[position], row))


class StyleImages(Portraits):
    """Images whose features are those of another image of the same style, see `StylePairs`."""

    def __init__(self, data: WorldDataset, *args: Any, **options: Any) -> None:
        super().__init__(data, *args, **options)
        self.pairs = StylePairs(np.array(data.people), np.array(data.attributes))

    def sample_captions(self, rows: Tensor, rng: StepRNG) -> list[str]:
        """Sample a caption of each row; some do not tell what the style image shows."""
        is_short = rng.rand(rows.shape, "short_captions") < SHORT_CAPTIONS
        captions = zip(super().sample_captions(rows, rng), is_short.tolist(), strict=True)
        return [remove_look(caption) if short else caption for caption, short in captions]

    def sample_references(self, rows: Tensor, rng: StepRNG) -> Tensor:
        """Sample the style image of each row."""
        return self.pairs.sample(rows, rng)


class ClipEmbeddingRows:
    """CLIP's embeddings of a dataset's images, computed when they are read.

    Args:
        data: the dataset.
        encoder: CLIP's vision encoder.
    """

    def __init__(self, data: WorldDataset, encoder: Any) -> None:
        self.data = data
        self.encoder = encoder

    @torch.no_grad()
    def rows(
        self, rows: np.ndarray, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, list[Tensor]]:
        """Return (B, E) embeddings, and no hidden states."""
        images, _, _ = load_faces(self.data, rows, torch.device(device))
        return self.encoder(pixel_values=normalize_for_clip(images)).image_embeds.float(), []


def open_style_images(
    context: BuildContext, name: str, encoder: Any, tokenizer: Any, batch_size: int
) -> StyleImages:
    """Open one dataset of the synthetic world with a style image for each image.

    Args:
        context: where the dataset is.
        name: of the dataset.
        encoder: CLIP's vision encoder.
        tokenizer: of the captions.
        batch_size: images per step, over all processes.
    """
    data = context.open(name)
    return StyleImages(
        data,
        context.load_latents(name),
        context.load_captions(name),
        ClipEmbeddingRows(data, encoder),
        tokenizer,
        batch_size,
        context.device,
        with_images=False,
    )
