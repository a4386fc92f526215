"""Random people, scenes and captions as tensors, thousands at a time, on any device.

`world.Scene` describes one scene in Python. Sampling 300,000 of them would take minutes on a CPU.
The functions of this module sample from the same distributions, with N scenes as a table of class
indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase

from openpulid.world import ATTRIBUTES, PARAMETERS, Scene
from openpulid.world.scene import (
    _CLAUSES,
    _CLOTHES,
    _HAIR,
    _HATS,
    _PATTERNS,
    _PHRASES,
    _SUBJECTS,
    COLOR_ATTRIBUTES,
    COMMON_PROBABILITY,
)
from openpulid.world.scene_tensors import SceneTensors

COLUMNS = {name: column for column, name in enumerate(ATTRIBUTES)}
JITTER = 12
"""Random offsets per scene."""
KEEP = 0.85
"""Probability that a caption mentions a visible attribute."""


@dataclass(frozen=True)
class Scenes:
    """N scenes.

    Attributes:
        attributes: (N, A) int64 class indices, in the order of `ATTRIBUTES`.
        jitter: (N, 12) in [-1, 1].
    """

    attributes: Tensor
    jitter: Tensor

    def __len__(self) -> int:
        return len(self.attributes)

    def __getitem__(self, rows: Tensor | slice) -> Scenes:
        return Scenes(self.attributes[rows], self.jitter[rows])

    def scene(self, row: int) -> Scene:
        """Return one scene as `world.Scene`."""
        classes = self.attributes[row].tolist()
        values = {
            name: names[k] for (name, names), k in zip(ATTRIBUTES.items(), classes, strict=True)
        }
        return Scene(**values, jitter=tuple(self.jitter[row].tolist()))

    def tensors(self) -> SceneTensors:
        """Return the input of the renderer."""
        return SceneTensors.from_classes(self.attributes, self.jitter)

    def visible(self) -> Tensor:
        """Return (N, A) bool: the visible attributes, as `Scene.attributes` defines them."""
        is_visible = torch.ones_like(self.attributes, dtype=torch.bool)
        is_colorless = self._is("style", "noir", "pencil")
        for name in COLOR_ATTRIBUTES:
            is_visible[:, COLUMNS[name]] &= ~is_colorless
        has_hat = ~self._is("hat", "none")
        is_bald = self._is("hair_length", "bald")
        is_visible[:, COLUMNS["hat_color"]] &= has_hat
        is_covered = has_hat & self._is("hair_length", "bald", "short")
        is_visible[:, COLUMNS["hair_color"]] &= ~(is_bald | is_covered)
        is_visible[:, COLUMNS["hair_length"]] &= ~is_covered
        has_sunglasses = self._is("glasses", "sunglasses")
        is_hidden = has_sunglasses & self._is("expression", "wink", "smile", "neutral")
        is_visible[:, COLUMNS["expression"]] &= ~is_hidden
        is_visible[:, COLUMNS["pattern"]] &= ~self._is("style", "pencil")
        return is_visible

    def _is(self, name: str, *kinds: str) -> Tensor:
        classes = [ATTRIBUTES[name].index(kind) for kind in kinds]
        values = self.attributes[:, COLUMNS[name]]
        return torch.isin(values, torch.tensor(classes, device=values.device))


def draw_people(count: int, generator: Generator) -> Tensor:
    """Draw (count, P) uniform identity values like `Person.sample`, on the generator's device."""
    return torch.rand(count, len(PARAMETERS), generator=generator, device=generator.device)


def draw_scenes(
    count: int, generator: Generator, held_out: bool = False, fixed: dict[str, str] | None = None
) -> Scenes:
    """Draw scenes from the distribution of `Scene.sample`.

    Args:
        count: number of scenes.
        generator: on the device of the result.
        held_out: draw the color combinations that are not in the training data.
        fixed: attribute -> class of all scenes.
    """
    device = generator.device
    columns = []
    for name, classes in ATTRIBUTES.items():
        common = COMMON_PROBABILITY.get(name, 1 / len(classes))
        weights = torch.tensor([common] + [(1 - common) / (len(classes) - 1)] * (len(classes) - 1))
        columns.append(
            torch.multinomial(weights.to(device), count, replacement=True, generator=generator)
        )
    pairs = [
        [ATTRIBUTES["background"].index(back), ATTRIBUTES["clothing"].index(cloth)]
        for back, cloth in product(ATTRIBUTES["background"], ATTRIBUTES["clothing"])
        if Scene(background=back, clothing=cloth).is_held_out == held_out
    ]
    table = torch.tensor(pairs, device=device)
    combinations = table[torch.randint(len(table), (count,), generator=generator, device=device)]
    columns[COLUMNS["background"]] = combinations[:, 0]
    columns[COLUMNS["clothing"]] = combinations[:, 1]
    for name, kind in (fixed or {}).items():
        columns[COLUMNS[name]] = torch.full_like(columns[0], ATTRIBUTES[name].index(kind))
    jitter = 2 * torch.rand(count, JITTER, generator=generator, device=device) - 1
    return Scenes(torch.stack(columns, 1), jitter)


# -- captions --


class CaptionWriter:
    """Writes captions as token ids, from the distribution of `Scene.prompt`.

    A caption is a subject, a style and one clause per visible attribute, separated by commas. Every
    clause has a finite number of states (classes, and whether a color is visible), each with a few
    phrasings.

    Args:
        tokenizer: of the text encoders.
        device: of the token ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self.device = device
        self.length = int(tokenizer.model_max_length)
        self.begin = tokenizer.bos_token_id
        self.end = tokenizer.eos_token_id
        self.pad = tokenizer.pad_token_id
        self.comma = tokenizer.convert_tokens_to_ids(",")
        self.ids = {word: tokenizer.convert_tokens_to_ids(word) for word in tokenizer.get_vocab()}
        styles = [_PHRASES["style"][kind] for kind in ATTRIBUTES["style"]]
        self.pieces = [self._table([_SUBJECTS]), self._table(styles)]
        self.pieces += [self._table(phrasings(name)) for name in _CLAUSES]

    def _table(self, states: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (states, phrasings, L), their lengths, and the phrasings of each state."""
        encoded: list[list[list[int]]] = []
        for state_phrases in states:
            words = [phrase.split() for phrase in state_phrases]
            encoded.append([[self.ids[word] for word in phrase] for phrase in words])
        max_phrasings = max(1, max(map(len, encoded)))
        longest = max(len(phrase) for phrases in encoded for phrase in phrases)
        tokens = torch.zeros(len(states), max_phrasings, longest, dtype=torch.long)
        lengths = torch.zeros(len(states), max_phrasings, dtype=torch.long)
        for state, phrases in enumerate(encoded):
            for k, phrase in enumerate(phrases):
                tokens[state, k, : len(phrase)] = torch.tensor(phrase)
                lengths[state, k] = len(phrase)
        counts = torch.tensor([len(phrases) for phrases in encoded])
        return tokens.to(self.device), lengths.to(self.device), counts.to(self.device)

    def write(self, scenes: Scenes, generator: Generator, keep: float = KEEP) -> Tensor:
        """Write one caption per scene.

        Args:
            scenes: N scenes.
            generator: on the writer's device.
            keep: probability that a caption mentions a visible attribute.

        Returns:
            (N, L) int64 token ids.
        """
        words, lengths = self._draw_pieces(scenes, generator)
        # drop some clauses; subject and style come first in random order, then the clauses
        uniform = torch.rand(lengths.shape, generator=generator, device=self.device)
        lengths[:, 2:] *= uniform[:, 2:] < keep
        order = torch.rand(lengths.shape, generator=generator, device=self.device)
        order[:, 2:] += 1
        order = order.argsort(1)
        words = words.gather(1, order[..., None].expand_as(words))
        return self._join(words, lengths.gather(1, order))

    def _draw_pieces(self, scenes: Scenes, generator: Generator) -> tuple[Tensor, Tensor]:
        """Draw a phrasing of every piece: tokens (N, pieces, L) and lengths (N, pieces)."""
        count = len(scenes)
        device = self.device
        is_visible = scenes.visible()
        states = [
            torch.zeros(count, dtype=torch.long, device=device),
            scenes.attributes[:, COLUMNS["style"]],
        ]
        states += [clause_state(name, scenes, is_visible) for name in _CLAUSES]
        longest = max(table[0].shape[-1] for table in self.pieces)
        words = torch.zeros(count, len(self.pieces), longest, dtype=torch.long, device=device)
        lengths = torch.zeros(count, len(self.pieces), dtype=torch.long, device=device)
        for k, ((tokens, sizes, counts), state) in enumerate(zip(self.pieces, states, strict=True)):
            uniform = torch.rand(count, generator=generator, device=device)
            phrasing = (uniform * counts[state]).long().clamp(max=tokens.shape[1] - 1)
            words[:, k, : tokens.shape[-1]] = tokens[state, phrasing]
            lengths[:, k] = torch.where(counts[state] > 0, sizes[state, phrasing], 0)
        return words, lengths

    def _join(self, words: Tensor, lengths: Tensor) -> Tensor:
        """Join the pieces of each caption with commas; pieces of length 0 are left out."""
        count = len(words)
        device = words.device
        longest = words.shape[-1]
        is_present = lengths > 0
        is_first = is_present & (is_present.cumsum(1) == 1)
        comma = (is_present & ~is_first).long()
        size = lengths + comma
        start = 1 + size.cumsum(1) - size
        spare = self.length  # unused tokens are written to this column, which is cut off
        caption = torch.full((count, spare + 1), self.pad, dtype=torch.long, device=device)
        caption[:, 0] = self.begin

        position = torch.where(comma > 0, start, spare).clamp(max=spare)
        caption.scatter_(1, position, self.comma)
        offset = torch.arange(longest, device=device)
        position = (start + comma)[..., None] + offset
        position = torch.where(offset < lengths[..., None], position, spare).clamp(max=spare)
        caption.scatter_(1, position.flatten(1), words.flatten(1))
        last = (1 + size.sum(1)).clamp(max=self.length - 1)
        caption.scatter_(1, last[:, None], self.end)
        return caption[:, : self.length]


def clause_state(name: str, scenes: Scenes, is_visible: Tensor) -> Tensor:
    """Return the state of a clause as an index into `phrasings(name)`.

    Args:
        name: the attribute.
        scenes: N scenes.
        is_visible: (N, A) see `Scenes.visible`.

    Returns:
        (N,) int64; 0 for an attribute that is not visible.
    """
    value = scenes.attributes[:, COLUMNS[name]]
    state = value + 1
    if name == "background":
        pattern = scenes.attributes[:, COLUMNS["pattern"]]
        state = 1 + value * len(ATTRIBUTES["pattern"]) + pattern
    if name in ("hat", "hair_length"):
        color = "hat_color" if name == "hat" else "hair_color"
        shade = torch.where(
            is_visible[:, COLUMNS[color]], scenes.attributes[:, COLUMNS[color]] + 1, 0
        )
        state = 1 + value * (len(ATTRIBUTES[color]) + 1) + shade
    return torch.where(is_visible[:, COLUMNS[name]], state, 0)


@lru_cache
def phrasings(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the phrasings of each state of a clause; the first state has none."""
    states: list[tuple[str, ...]] = [()]
    if name == "background":
        for color, pattern in product(ATTRIBUTES["background"], ATTRIBUTES["pattern"]):
            states.append(tuple(phrase.format(color) for phrase in _PATTERNS[pattern]))
    elif name == "clothing":
        states += [
            tuple(phrase.format(color) for phrase in _CLOTHES) for color in ATTRIBUTES["clothing"]
        ]
    elif name in ("hat", "hair_length"):
        colors = ATTRIBUTES["hat_color" if name == "hat" else "hair_color"]
        for kind, color in product(ATTRIBUTES[name], ("", *colors)):
            states.append(tuple(_insert_color(phrase, color) for phrase in _templates(name, kind)))
    else:
        states += [_PHRASES[name][kind] for kind in ATTRIBUTES[name]]
    return tuple(states)


def _templates(name: str, kind: str) -> tuple[str, ...]:
    if name == "hat":
        return () if kind == "none" else _HATS[kind]
    return ("bald",) if kind == "bald" else (_HAIR[kind],)


def _insert_color(phrase: str, color: str) -> str:
    return phrase.format(color) if color else phrase.replace("{} ", "")
