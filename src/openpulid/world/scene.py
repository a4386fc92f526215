"""Everything about a picture that is not the person, and the sentence that asks for it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "pose": ("front", "left", "right", "up", "down"),
    "expression": ("neutral", "smile", "laugh", "sad", "angry", "surprised", "wink"),
    "light": ("studio", "left", "right", "sunset", "moon", "neon"),
    "background": (
        "white", "gray", "black", "red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "brown",
    ),
    "pattern": ("plain", "stripes", "dots"),
    "clothing": ("white", "black", "red", "yellow", "green", "blue", "purple"),
    "glasses": ("none", "glasses", "sunglasses"),
    "hat": ("none", "beanie", "brimmed"),
    "hat_color": ("red", "yellow", "green", "blue", "white", "black"),
    "hair_color": ("black", "brown", "blond", "red", "gray"),
    "hair_length": ("bald", "short", "bob", "long"),
    "beard": ("none", "moustache", "beard"),
    "style": ("photo", "noir", "pencil", "poster"),
}  # fmt: skip
"""Each attribute of a scene and its classes; the first class is the most common one."""

COMMON_PROBABILITY = {
    "pose": 0.4,
    "expression": 0.3,
    "light": 0.4,
    "pattern": 0.7,
    "glasses": 0.75,
    "hat": 0.75,
    "beard": 0.85,
    "style": 0.7,
}
"""How often the first class is drawn; the other classes share the rest. Attributes not named are uniform."""

COLOR_ATTRIBUTES = ("light", "background", "clothing", "hat_color", "hair_color")

_PHRASES: dict[str, dict[str, tuple[str, ...]]] = {
    "pose": {
        "front": ("facing the camera", "front view"),
        "left": ("turned left", "looking left"),
        "right": ("turned right", "looking right"),
        "up": ("looking up",),
        "down": ("looking down",),
    },
    "expression": {
        "neutral": ("neutral face", "calm"),
        "smile": ("smiling", "with a smile"),
        "laugh": ("laughing",),
        "sad": ("sad", "unhappy"),
        "angry": ("angry", "furious"),
        "surprised": ("surprised", "amazed"),
        "wink": ("winking",),
    },
    "light": {
        "studio": ("soft studio light", "soft light"),
        "left": ("light from the left",),
        "right": ("light from the right",),
        "sunset": ("sunset light", "warm evening light"),
        "moon": ("moonlight", "cold night light"),
        "neon": ("neon light",),
    },
    "glasses": {
        "none": (),
        "glasses": ("wearing glasses",),
        "sunglasses": ("wearing sunglasses", "in dark sunglasses"),
    },
    "beard": {"none": (), "moustache": ("with a moustache",), "beard": ("with a beard", "bearded")},
    "style": {
        "photo": ("photo", "color photo"),
        "noir": ("film noir", "black and white film noir"),
        "pencil": ("pencil sketch", "pencil drawing"),
        "poster": ("poster", "poster art"),
    },
}
_PATTERNS = {
    "plain": ("{} background", "plain {} background"),
    "stripes": ("{} striped background",),
    "dots": ("{} dotted background",),
}
_HATS = {
    "beanie": ("{} beanie", "wearing a {} beanie"),
    "brimmed": ("{} hat with a brim", "wearing a {} hat with a brim"),
}
_CLOTHES = ("{} shirt", "wearing a {} shirt", "{} clothes")
_HAIR = {"short": "short {} hair", "bob": "{} bob hair", "long": "long {} hair"}
_SUBJECTS = ("portrait", "portrait of a person", "a person")


@dataclass(frozen=True)
class Scene:
    """One picture's attributes (see `ATTRIBUTES`) and `jitter`, small free variations in [-1, 1] that have no words.

    `Scene()` is the neutral portrait: front, soft light, plain gray, short brown hair.
    """

    pose: str = "front"
    expression: str = "neutral"
    light: str = "studio"
    background: str = "gray"
    pattern: str = "plain"
    clothing: str = "blue"
    glasses: str = "none"
    hat: str = "none"
    hat_color: str = "red"
    hair_color: str = "brown"
    hair_length: str = "short"
    beard: str = "none"
    style: str = "photo"
    jitter: tuple[float, ...] = (0.0,) * 12

    @classmethod
    def sample(cls, generator: torch.Generator, held_out: bool = False, **fixed: str) -> Scene:
        """A random scene; `held_out`: of the colour combinations that no training has seen; `fixed` sets attributes."""
        jitter = tuple((2 * torch.rand(12, generator=generator) - 1).tolist())
        while True:
            drawn = {
                name: _sample_class(name, classes, generator)
                for name, classes in ATTRIBUTES.items()
            }
            scene = cls(jitter=jitter, **(drawn | fixed))
            if scene.is_held_out == held_out:
                return scene

    @property
    def is_held_out(self) -> bool:
        """One in seven pairs of background and clothing colour is kept out of every training."""
        classes = (
            ATTRIBUTES["background"].index(self.background),
            ATTRIBUTES["clothing"].index(self.clothing),
        )
        return (classes[0] + 3 * classes[1]) % 7 == 0

    def replace(self, **values: str) -> Scene:
        """The same scene with some attributes changed."""
        return dataclasses.replace(self, **values)  # type: ignore[arg-type]

    def attributes(self) -> dict[str, str]:
        """The attributes that can be seen in the picture, and only those: a pencil sketch has no colours."""
        seen = {name: getattr(self, name) for name in ATTRIBUTES}
        if self.style in ("noir", "pencil"):
            for name in COLOR_ATTRIBUTES:
                del seen[name]
        if self.hat == "none":
            seen.pop("hat_color", None)
        if self.hair_length == "bald":
            seen.pop("hair_color", None)
        if self.hat != "none" and self.hair_length in ("bald", "short"):
            seen.pop("hair_color", None)
            del seen["hair_length"]
        if self.glasses == "sunglasses" and self.expression in ("wink", "smile", "neutral"):
            del seen["expression"]
        if self.style == "pencil":
            del seen["pattern"]
        return seen

    def prompt(self, generator: torch.Generator, keep: float = 0.85) -> str:
        """A sentence for this scene: synonyms, each visible attribute with probability `keep`, in random order."""
        seen = self.attributes()
        style = _sample_phrase(_PHRASES["style"][self.style], generator)
        subject = _sample_phrase(_SUBJECTS, generator)
        clauses = [
            clause for clause in (_clause(name, seen, generator) for name in _CLAUSES) if clause
        ]
        order = torch.randperm(len(clauses), generator=generator).tolist()
        kept = torch.rand(len(clauses), generator=generator) < keep
        chosen = [clauses[index] for index in order if kept[index]]
        return ", ".join(
            [subject, style, *chosen]
            if torch.rand((), generator=generator) < 0.5
            else [style, subject, *chosen]
        )


_CLAUSES = (
    "pose",
    "expression",
    "light",
    "background",
    "clothing",
    "glasses",
    "hat",
    "hair_length",
    "beard",
)


def _clause(name: str, seen: dict[str, str], generator: torch.Generator) -> str:
    """The words for one attribute (or two that share a clause), empty where there is nothing to say."""
    value = seen.get(name)
    if value is None:
        return ""
    if name == "background":
        return _sample_phrase(_PATTERNS[seen["pattern"]], generator).format(value)
    if name == "clothing":
        return _sample_phrase(_CLOTHES, generator).format(value)
    if name == "hat":
        if value == "none":
            return ""
        phrase = _sample_phrase(_HATS[value], generator)
        return (
            phrase.format(seen["hat_color"]) if "hat_color" in seen else phrase.replace("{} ", "")
        )
    if name == "hair_length":
        if value == "bald":
            return "bald"
        return (
            _HAIR[value].format(seen["hair_color"])
            if "hair_color" in seen
            else _HAIR[value].replace("{} ", "")
        )
    return _sample_phrase(_PHRASES[name][value], generator)


def _sample_class(name: str, classes: tuple[str, ...], generator: torch.Generator) -> str:
    common = COMMON_PROBABILITY.get(name, 1 / len(classes))
    weights = torch.tensor([common] + [(1 - common) / (len(classes) - 1)] * (len(classes) - 1))
    return classes[int(torch.multinomial(weights, 1, generator=generator))]


def _sample_phrase(phrases: tuple[str, ...], generator: torch.Generator) -> str:
    return phrases[int(torch.randint(len(phrases), (), generator=generator))] if phrases else ""


def _build_vocabulary() -> tuple[str, ...]:
    phrases = [*_SUBJECTS, *_CLOTHES, *_HAIR.values(), "bald"]
    phrases += [
        text for classes in _PHRASES.values() for texts in classes.values() for text in texts
    ]
    phrases += [text for table in (_PATTERNS, _HATS) for texts in table.values() for text in texts]
    for name in ("background", "clothing", "hat_color", "hair_color"):
        phrases += ATTRIBUTES[name]
    words = {word for phrase in phrases for word in re.findall(r"[a-z]+", phrase)}
    return (",", *sorted(words))


VOCABULARY: tuple[str, ...] = _build_vocabulary()
"""Every word that a prompt of this world can hold, and the comma."""
