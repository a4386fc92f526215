"""Everything about an image except the person, and prompts that describe it."""

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
        "white", "gray", "black", "red", "orange", "yellow", "green", "teal", "blue", "purple",
        "pink", "brown",
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
"""The classes of each attribute of a scene; the first class is the most common one."""

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
"""Probability of an attribute's first class; the remaining classes are equally likely.

The classes of all other attributes are equally likely."""

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
    """Attributes of an image (see `ATTRIBUTES`) and small variations that prompts do not mention.

    `Scene()` is the neutral portrait: front view, soft light, plain gray background, short brown
    hair.

    Attributes:
        jitter: 12 variations of pose, position, light and hair in [-1, 1].
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
        """Sample a scene.

        Args:
            generator: source of randomness.
            held_out: use only color combinations that are held out of training, else none.
            fixed: attributes to set instead of sampling them.
        """
        jitter = _sample_jitter(generator)
        while True:
            sampled = {
                name: _sample_class(name, classes, generator)
                for name, classes in ATTRIBUTES.items()
            }
            scene = cls(jitter=jitter, **(sampled | fixed))
            if scene.is_held_out == held_out:
                return scene

    @property
    def is_held_out(self) -> bool:
        """Whether this pair of background and clothing color is held out; one in seven is."""
        background = ATTRIBUTES["background"].index(self.background)
        clothing = ATTRIBUTES["clothing"].index(self.clothing)
        return (background + 3 * clothing) % 7 == 0

    def with_jitter(self, generator: torch.Generator) -> Scene:
        """Return the scene with other variations of pose, position, light and hair."""
        return dataclasses.replace(self, jitter=_sample_jitter(generator))

    def replace(self, **values: str) -> Scene:
        """Return the scene with some attributes changed."""
        return dataclasses.replace(self, **values)  # type: ignore[arg-type]

    def attributes(self) -> dict[str, str]:
        """Return the attributes that are visible in the image; a pencil sketch has no colors."""
        visible = {name: getattr(self, name) for name in ATTRIBUTES}
        if self.style in ("noir", "pencil"):
            for name in COLOR_ATTRIBUTES:
                del visible[name]
        if self.hat == "none":
            visible.pop("hat_color", None)
        if self.hair_length == "bald":
            visible.pop("hair_color", None)
        if self.hat != "none" and self.hair_length in ("bald", "short"):
            visible.pop("hair_color", None)
            del visible["hair_length"]
        if self.glasses == "sunglasses" and self.expression in ("wink", "smile", "neutral"):
            del visible["expression"]
        if self.style == "pencil":
            del visible["pattern"]
        return visible

    def prompt(
        self, generator: torch.Generator, keep: float = 0.85, shared_with: Scene | None = None
    ) -> str:
        """Generate a prompt with random synonyms and order.

        Args:
            generator: source of randomness.
            keep: probability that a visible attribute is mentioned.
            shared_with: mention only attributes that are the same in this scene, of the same style.
        """
        visible = self.attributes()
        if shared_with is not None:
            shared = shared_with.attributes().items()
            visible = {name: value for name, value in visible.items() if (name, value) in shared}
        style = _sample_phrase(_PHRASES["style"][self.style], generator)
        subject = _sample_phrase(_SUBJECTS, generator)
        clauses = [
            clause for clause in (_clause(name, visible, generator) for name in _CLAUSES) if clause
        ]
        order = torch.randperm(len(clauses), generator=generator).tolist()
        is_kept = torch.rand(len(clauses), generator=generator) < keep
        clauses = [clauses[index] for index in order if is_kept[index]]
        if torch.rand((), generator=generator) < 0.5:
            return ", ".join([subject, style, *clauses])
        return ", ".join([style, subject, *clauses])


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


def _clause(name: str, visible: dict[str, str], generator: torch.Generator) -> str:
    """Describe an attribute, or two that share a clause; return "" if it is not mentioned."""
    value = visible.get(name)
    if value is None:
        return ""
    if name == "background" and "pattern" not in visible:
        return ""
    if name == "background":
        return _sample_phrase(_PATTERNS[visible["pattern"]], generator).format(value)
    if name == "clothing":
        return _sample_phrase(_CLOTHES, generator).format(value)
    if name == "hat":
        if value == "none":
            return ""
        phrase = _sample_phrase(_HATS[value], generator)
        return _insert_color(phrase, visible.get("hat_color"))
    if name == "hair_length":
        if value == "bald":
            return "bald"
        return _insert_color(_HAIR[value], visible.get("hair_color"))
    return _sample_phrase(_PHRASES[name][value], generator)


def _insert_color(phrase: str, color: str | None) -> str:
    return phrase.format(color) if color else phrase.replace("{} ", "")


def _sample_jitter(generator: torch.Generator) -> tuple[float, ...]:
    return tuple((2 * torch.rand(12, generator=generator) - 1).tolist())


def _sample_class(name: str, classes: tuple[str, ...], generator: torch.Generator) -> str:
    num_others = len(classes) - 1
    common = COMMON_PROBABILITY.get(name, 1 / len(classes))
    weights = torch.tensor([common] + [(1 - common) / num_others] * num_others)
    return classes[int(torch.multinomial(weights, 1, generator=generator))]


def _sample_phrase(phrases: tuple[str, ...], generator: torch.Generator) -> str:
    return phrases[int(torch.randint(len(phrases), (), generator=generator))] if phrases else ""


def list_phrases() -> dict[str, tuple[str, ...]]:
    """Return phrases for prompts by topic. Phrases of one topic exclude each other."""
    phrases = {
        name: tuple(synonyms[0] for synonyms in _PHRASES[name].values() if synonyms)
        for name in ("style", "expression", "pose", "light", "glasses", "beard")
    }
    phrases["background"] = tuple(
        pattern[0].format(color)
        for pattern, colors in zip(
            _PATTERNS.values(), (ATTRIBUTES["background"], ("yellow",), ("blue",)), strict=True
        )
        for color in colors
    )
    phrases["clothing"] = tuple(_CLOTHES[0].format(color) for color in ATTRIBUTES["clothing"])
    phrases["hat"] = tuple(
        hat[0].format(color) for hat in _HATS.values() for color in ATTRIBUTES["hat_color"][:4]
    )
    phrases["hair"] = (
        "bald",
        *(hair.format(color) for hair in _HAIR.values() for color in ATTRIBUTES["hair_color"][:4]),
    )
    return phrases


_LOOK_PHRASES = frozenset(
    phrase
    for name in ("style", "light")
    for synonyms in _PHRASES[name].values()
    for phrase in synonyms
)


def remove_look(prompt: str) -> str:
    """Remove what a prompt says about style, light and background."""
    clauses = [clause.strip() for clause in prompt.split(",")]
    return ", ".join(
        clause
        for clause in clauses
        if clause not in _LOOK_PHRASES and not clause.endswith(" background")
    )


def _build_vocabulary() -> tuple[str, ...]:
    phrases = [*_SUBJECTS, *_CLOTHES, *_HAIR.values(), "bald"]
    for classes in _PHRASES.values():
        for synonyms in classes.values():
            phrases += synonyms
    for table in (_PATTERNS, _HATS):
        for synonyms in table.values():
            phrases += synonyms
    for name in ("background", "clothing", "hat_color", "hair_color"):
        phrases += ATTRIBUTES[name]
    words = {word for phrase in phrases for word in re.findall(r"[a-z]+", phrase)}
    return (",", *sorted(words))


VOCABULARY: tuple[str, ...] = _build_vocabulary()
"""All words of the prompts of this world, and the comma."""
