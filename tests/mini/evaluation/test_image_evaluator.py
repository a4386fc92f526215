"""Evaluation of the base model and its student on prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from openpulid.mini.evaluation.image_evaluator import ImageEvaluator, frechet_distance
from openpulid.mini.models import build_pipeline
from openpulid.mini.train.build_context import BuildContext
from openpulid.mini.train.distill import STUDENT_TIMESTEPS
from openpulid.pipelines.presets import MINIATURE


@pytest.fixture(scope="module")
def evaluator(tmp_path_factory: pytest.TempPathFactory) -> ImageEvaluator:
    context = BuildContext(tmp_path_factory.mktemp("runs"), MINIATURE, torch.device("cpu"))
    student = UNet2DConditionModel.from_pretrained(MINIATURE / "lightning")
    pipe = build_pipeline(
        student,
        context.load_vae(),
        context.load_text_encoders(),
        context.load_tokenizer(),
        order=1,
    )
    evaluator = ImageEvaluator.load(
        context.weights, context.device, pipe=pipe, steps=STUDENT_TIMESTEPS, guidance=1.0
    )
    return replace(evaluator, prompts=evaluator.prompts[:32])


def test_student_shows_what_prompts_ask_for(evaluator: ImageEvaluator) -> None:
    results = evaluator.evaluate()
    assert results["attributes"] > 0.9 and results["pose"] > 0.9
    assert results["face_found"] == 1.0
    assert 0.4 < results["expression"] <= 1.0
    assert 0 < results["frechet"] < 1000
    assert 0 < results["frechet_real"] < 1000
    assert results["attributes_real"] > 0.95 and results["face_found_real"] == 1.0
    assert 0.8 < results["expression_real"] <= 1.0 and results["pose_real"] > 0.95
    torch.manual_seed(0)
    components = dict(evaluator.pipe.components)
    components["unet"] = UNet2DConditionModel.from_config(evaluator.pipe.unet.config)
    components["unet"].eval()
    untrained = type(evaluator.pipe)(**components)
    untrained.set_progress_bar_config(disable=True)
    noise = replace(evaluator, pipe=untrained).evaluate()
    assert noise["attributes"] < 0.5 and not noise["face_found"] and "frechet" not in noise


def test_frechet_distance_of_two_normal_distributions() -> None:
    torch.manual_seed(0)
    one, two = torch.randn(20000, 4), 2 * torch.randn(20000, 4) + 1
    # 4 of the means, 4 of the deviations
    assert frechet_distance(one, two) == pytest.approx(8.0, rel=0.05)
    assert frechet_distance(one, one) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_of_real_faces_to_themselves_is_zero(evaluator: ImageEvaluator) -> None:
    real = evaluator.real_embeddings
    assert len(real) == 32
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-4)
    assert frechet_distance(real, real + 0.1) == pytest.approx(0.01 * real.shape[1], rel=1e-3)
