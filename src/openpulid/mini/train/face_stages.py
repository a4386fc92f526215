"""Build stages of the face models: detector, recognition models and attribute classifier."""

from __future__ import annotations

from typing import Any

import torch

from openpulid.faces.mini_detector import MiniFaceDetector
from openpulid.faces.mini_recognition import RECOGNITION_MODELS
from openpulid.io.checkpoints import save_module
from openpulid.mini.data.negatives import load_photographs
from openpulid.mini.models.attribute_classifier import AttributeClassifier
from openpulid.mini.train.attribute_classifier import AttributeClassifierTask, evaluate_classifier
from openpulid.mini.train.build_context import BuildContext
from openpulid.mini.train.detector import DetectorTask, evaluate_detector
from openpulid.mini.train.recognition import (
    RecognitionEvaluator,
    RecognitionTask,
    format_report,
    whiten_embeddings,
)
from openpulid.training.config import TrainerConfig


def train_detector(context: BuildContext) -> dict[str, float]:
    """Train the face detector."""
    config = TrainerConfig(steps=20_000, lr=2e-3, decay=0.3, seed=1, validate_every=400)
    torch.manual_seed(config.seed)
    detector = MiniFaceDetector()
    task = DetectorTask(detector, context.data, context.held_out, load_photographs())
    context.train("detector", task, config)
    path = context.weights / "detector.safetensors"
    save_module(detector, path, context.describe_training("detector", config), torch.float16)
    results = dict(evaluate_detector(detector, context.held_out))
    return {**results, "refused": task.rejection_rate(context.held_out, 512)}


def train_recognition(context: BuildContext, *, name: str, seed: int) -> dict[str, float]:
    """Train a face recognition model and report which face parameters change its embedding.

    Args:
        context: of the build.
        name: a key of `RECOGNITION_MODELS`; each has another architecture.
        seed: of the training; each has its own.
    """
    config = TrainerConfig(
        steps=20_000,
        lr=3e-3,
        optimizer="muon",
        weight_decay=0.1,
        warmup=50,
        decay=0.6,
        ema=0.995,
        seed=seed,
        validate_every=800,
    )
    torch.manual_seed(seed)
    evaluator = RecognitionEvaluator.build(context.held_out, context.runs / "moved.npy")
    model: Any = RECOGNITION_MODELS[name]()
    run_name = f"recognition-{name}"
    task = RecognitionTask(model, context.data, evaluator)
    context.train(run_name, task, config)
    whiten_embeddings(task)
    path = context.weights / f"{run_name}.safetensors"
    save_module(model, path, context.describe_training(run_name, config), torch.float16)
    report = format_report({name: model}, evaluator)
    (context.runs / run_name / "report.md").write_text(report, "utf-8")
    return evaluator.evaluate(model)


def train_attribute_classifier(context: BuildContext) -> dict[str, float]:
    """Train the attribute classifier, which measures whether images match their prompts."""
    config = TrainerConfig(
        steps=20_000, lr=2e-3, decay=0.4, ema=0.995, seed=7, validate_every=400, weight_decay=0.05
    )
    torch.manual_seed(config.seed)
    classifier = AttributeClassifier()
    task = AttributeClassifierTask(classifier, context.data, context.held_out)
    context.train("attribute-classifier", task, config)
    path = context.weights / "attribute-classifier.safetensors"
    facts = context.describe_training("attribute-classifier", config)
    save_module(task.classifier, path, facts, torch.float16)
    return evaluate_classifier(task.classifier, context.held_out, limit=2048)
