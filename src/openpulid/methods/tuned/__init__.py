"""Methods that are tuned on images of one person, who is then in the method's file."""

from openpulid.methods.tuned.base import TunedAdapter
from openpulid.methods.tuned.custom_diffusion import CustomDiffusion, detach_first_token
from openpulid.methods.tuned.dreambooth import DreamBooth
from openpulid.methods.tuned.lora import PARTS, TunedLora
from openpulid.methods.tuned.textual_inversion import TextualInversion
from openpulid.methods.tuned.words import (
    ENCODERS,
    Trigger,
    encoder_words,
    find_token,
    read_words,
)

__all__ = [
    "ENCODERS",
    "PARTS",
    "CustomDiffusion",
    "DreamBooth",
    "TextualInversion",
    "Trigger",
    "TunedAdapter",
    "TunedLora",
    "detach_first_token",
    "encoder_words",
    "find_token",
    "read_words",
]
