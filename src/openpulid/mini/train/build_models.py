"""Trained models that several build stages load: text encoders and the evaluator of images."""

from __future__ import annotations

from typing import Any

from transformers import CLIPTextModel, CLIPTextModelWithProjection

from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.io.checkpoints import load_module
from openpulid.mini.models.attribute_classifier import AttributeClassifier
from openpulid.mini.models.pipeline import TextEncoders
from openpulid.mini.train.build_context import BuildContext
from openpulid.mini.train.unet import ImageEvaluator

NUM_EVAL_PROMPTS = 256
"""Prompts on which the base model and its student are evaluated."""


def load_text_encoders(context: BuildContext) -> TextEncoders:
    """Load both text encoders of the pipeline.

    Raises:
        WeightsError: they are not trained yet.
    """
    first = context.load_model(CLIPTextModel, "pipeline", "text_encoder")
    second = context.load_model(CLIPTextModelWithProjection, "pipeline", "text_encoder_2")
    return TextEncoders(first, second).to(context.device)


def load_image_evaluator(context: BuildContext, **options: Any) -> ImageEvaluator:
    """Load the models that the evaluation of a U-Net needs.

    Args:
        context: of the build.
        **options: sampling options of `ImageEvaluator`.

    Returns:
        An evaluator; without a face detector if it is not trained yet.
    """
    classifier_path = context.weights / "attribute-classifier.safetensors"
    detector_path = context.weights / "detector.safetensors"
    detector = None
    if detector_path.exists():
        detector = load_module(MiniFaceDetector, detector_path, context.device)
    return ImageEvaluator.with_prompts(
        NUM_EVAL_PROMPTS,
        vae=context.load_vae(),
        text_encoders=load_text_encoders(context),
        tokenizer=context.load_tokenizer(),
        classifier=load_module(AttributeClassifier, classifier_path, context.device),
        detector=detector,
        **options,
    )
