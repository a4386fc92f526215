"""Networks and pipeline of the miniature."""

from openpulid.mini.models.attribute_classifier import AttributeClassifier
from openpulid.mini.models.pipeline import (
    TextEncoders,
    build_pipeline,
    build_scheduler,
    build_unet,
    predict,
    sample,
    save_folder,
)
from openpulid.mini.models.tokenizer import build_tokenizer

__all__ = [
    "AttributeClassifier",
    "TextEncoders",
    "build_pipeline",
    "build_scheduler",
    "build_tokenizer",
    "build_unet",
    "predict",
    "sample",
    "save_folder",
]
