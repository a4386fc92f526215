"""Prompts to start from, and the words that the miniature knows."""

from __future__ import annotations

from openpulid.world import list_phrases

DEFAULT_PROMPT = "portrait, photo, smiling, red beanie"
"""A prompt for the first images, which every preset understands."""

MINI_EXAMPLES = (
    "portrait, photo, smiling, red beanie",
    "portrait, film noir, smiling",
    "portrait, photo, laughing, neon light, purple background",
    "pencil sketch, portrait, turned left",
    "poster art, portrait, wearing sunglasses, yellow dotted background",
)

PHOTO_EXAMPLES = (
    "portrait, film noir, rain at night, soft rim light",
    "portrait of a person as an astronaut in a field of sunflowers, 35 mm photo",
    "oil painting of a person reading in a cafe, warm evening light",
    "pencil sketch of a person laughing, white paper",
    "a person hiking in the mountains at sunrise, wide shot",
)


def list_topics() -> dict[str, tuple[str, ...]]:
    """Return the phrases that the miniature knows, by topic."""
    return list_phrases()
