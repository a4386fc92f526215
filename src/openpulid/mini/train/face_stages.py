"""Build stages of the face models: detector, recognition models and attribute classifier."""

from __future__ import annotations

from typing import Any

import torch

from openpulid.faces.miniature import RECOGNITION_MODELS, MiniFaceDetector
from openpulid.mini.data import load_photographs
from openpulid.mini.evaluation.value_reader import ValueReader, measure_reader
from openpulid.mini.models import AttributeClassifier
from openpulid.mini.train.attribute_classifier import AttributeClassifierTask, evaluate_classifier
from openpulid.mini.train.build_context import BuildContext
from openpulid.mini.train.detector import DetectorTask, evaluate_detector
from openpulid.mini.train.recognition import (
    RecognitionEvaluator,
    RecognitionTask,
    format_report,
    whiten_embeddings,
)
from openpulid.training import TrainerConfig


def train_detector(context: BuildContext) -> dict[str, float]:
    """Train the face detector."""
    config = TrainerConfig(steps=20_000, lr=2e-3, decay=0.3, seed=1, validate_every=400)
    torch.manual_seed(config.seed)
    detector = MiniFaceDetector()
    task = DetectorTask(detector, context.data, context.held_out, load_photographs())
    context.train("detector", task, config)
    context.save_module(detector, "detector", config)
    results = dict(evaluate_detector(detector, context.held_out))
    return {**results, "refused": task.rejection_rate(context.held_out, 512)}


def train_recognition(
    context: BuildContext, *, name: str, seed: int, details: bool = False
) -> dict[str, float]:
    """Train a face recognition model and report which face parameters change its embedding.

    Args:
        context: of the build.
        name: a key of `RECOGNITION_MODELS`; each has another architecture.
        seed: of the training; each has its own.
        details: see `RecognitionTask`.
    """
    config = _recognition_config(seed)
    torch.manual_seed(seed)
    evaluator = RecognitionEvaluator.build(context.held_out)
    model: Any = RECOGNITION_MODELS[name]()
    run_name = f"recognition-{name}"
    task = RecognitionTask(model, context.data, evaluator, details=details)
    context.train(run_name, task, config)
    whiten_embeddings(task)
    context.save_module(model, run_name, config)
    report = format_report({name: model}, evaluator)
    (context.runs / run_name / "report.md").write_text(report, "utf-8")
    return evaluator.evaluate(model)


def train_value_reader(context: BuildContext) -> dict[str, float]:
    """Train the network that reads facial parameters from images, without a margin loss."""
    config = _recognition_config(14)
    torch.manual_seed(config.seed)
    reader = ValueReader()
    task = RecognitionTask(reader.network, context.data, None, margin_weight=0.0, details=True)
    context.train("values", task, config)
    reader.head = task.values
    context.save_module(reader, "value-reader", config, "values")
    return measure_reader(reader.eval(), context.held_out)


def _recognition_config(seed: int) -> TrainerConfig:
    return TrainerConfig(
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


def train_attribute_classifier(context: BuildContext) -> dict[str, float]:
    """Train the attribute classifier, which measures whether images match their prompts."""
    config = TrainerConfig(
        steps=20_000, lr=2e-3, decay=0.4, ema=0.995, seed=7, validate_every=400, weight_decay=0.05
    )
    torch.manual_seed(config.seed)
    classifier = AttributeClassifier()
    task = AttributeClassifierTask(classifier, context.data, context.held_out)
    context.train("attribute-classifier", task, config)
    context.save_module(task.classifier, "attribute-classifier", config)
    return evaluate_classifier(task.classifier, context.held_out, limit=2048)
