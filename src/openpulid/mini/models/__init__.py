"""Networks and pipeline of the miniature."""

from openpulid.mini.models.attribute_classifier import AttributeClassifier
from openpulid.mini.models.face_generator import FaceGenerator
from openpulid.mini.models.flux import (
    LATENT_PATCHES,
    PACKING,
    FluxTextEncoders,
    build_flow_scheduler,
    build_flux_pipeline,
    build_t5,
    build_transformer,
    save_flux_pipeline,
    shorten,
)
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
    "LATENT_PATCHES",
    "PACKING",
    "AttributeClassifier",
    "FaceGenerator",
    "FluxTextEncoders",
    "TextEncoders",
    "build_flow_scheduler",
    "build_flux_pipeline",
    "build_pipeline",
    "build_scheduler",
    "build_t5",
    "build_tokenizer",
    "build_transformer",
    "build_unet",
    "predict",
    "sample",
    "save_flux_pipeline",
    "save_folder",
    "shorten",
]
