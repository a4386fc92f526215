"""Procedural people and scenes: a small world in which identity and scene are known exactly."""

from openpulid.world.dataset import WorldDataset
from openpulid.world.person import FACIAL, HELD_OUT_PEOPLE, PARAMETERS, SKIN, Person
from openpulid.world.render import PARTS, Rendering, render
from openpulid.world.scene import ATTRIBUTES, VOCABULARY, Scene, list_phrases, remove_look

__all__ = [
    "ATTRIBUTES",
    "FACIAL",
    "HELD_OUT_PEOPLE",
    "PARAMETERS",
    "PARTS",
    "SKIN",
    "VOCABULARY",
    "Person",
    "Rendering",
    "Scene",
    "WorldDataset",
    "list_phrases",
    "remove_look",
    "render",
]
