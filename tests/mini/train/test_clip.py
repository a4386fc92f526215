"""CLIP, its text encoders and the attribute classifier."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from openpulid.mini.data.captions import Captions, token_ids
from openpulid.mini.models.attribute_classifier import AttributeClassifier
from openpulid.mini.models.tokenizer import build_tokenizer
from openpulid.mini.train.attribute_classifier import (
    AttributeClassifierTask,
    attribute_loss,
    compute_accuracy,
    mark_correct,
)
from openpulid.mini.train.clip import (
    ClipTask,
    build_clip,
    build_first_text_encoder,
    contrastive_loss,
    rescale_text_encoder,
)
from openpulid.mini.train.clip_faces import ClipFacesTask
from openpulid.pipelines.presets import MINIATURE
from openpulid.training.rng import StepRNG
from openpulid.world import ATTRIBUTES, Scene


@pytest.fixture
def captions(small_world):
    generator = torch.Generator().manual_seed(0)
    prompts = [Scene.sample(generator).prompt(generator) for _ in range(len(small_world))]
    return Captions(token_ids(build_tokenizer(), prompts)[:, None].numpy().astype(np.uint8))


def test_contrastive_loss_of_identical_embeddings_is_chance():
    same = torch.ones(4, 8)
    assert contrastive_loss(same, same, torch.tensor(20.0)).item() == pytest.approx(np.log(4))
    distinct = torch.eye(4)
    assert contrastive_loss(distinct, distinct, torch.tensor(100.0)).item() < 1e-6


def test_clip_losses_reach_both_encoders(small_world, captions):
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    task = ClipTask(
        build_clip(tokenizer, width=32, layers=1),
        build_first_text_encoder(tokenizer, 32),
        tokenizer,
        small_world,
        captions,
        batch=6,
    )
    losses = task.losses(StepRNG(0, 0))
    assert set(losses) == {
        "clip",
        "text",
        "image_attributes",
        "text_attributes",
        "first_text_attributes",
    }
    torch.stack(list(losses.values())).sum().backward()
    assert task.clip.visual_projection.weight.grad.abs().sum() > 0
    assert task.text_encoder.text_projection.weight.grad.abs().sum() > 0


def test_rescaling_changes_norms_but_not_directions(captions):
    torch.manual_seed(0)
    model = build_first_text_encoder(build_tokenizer()).eval()
    tokens = captions.rows(torch.arange(12), torch.zeros(12, dtype=torch.long))
    with torch.no_grad():
        original = model(input_ids=tokens).text_embeds
        rescale_text_encoder(model.text_model, model.text_projection, tokens)
        rescaled = model(input_ids=tokens, output_hidden_states=True)
    assert cosine_similarity(original, rescaled.text_embeds).min() > 0.99
    assert rescaled.hidden_states[-2].square().mean().item() == pytest.approx(1, rel=0.02)
    assert rescaled.text_embeds.square().mean().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("folder", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize(
    ("one", "other"),
    [("calm", "sad"), ("calm", "furious"), ("smiling", "winking"), ("looking up", "looking down"),
     ("with a beard", "with a moustache"), ("red shirt", "green shirt")],
)  # fmt: skip
def test_every_word_changes_text_embeddings(folder, one, other):
    """Early text encoders embedded expressions with 0.1 of the deviation.

    No base model learned expressions from them.
    """
    model = CLIPTextModel.from_pretrained(
        MINIATURE / "pipeline" / folder, torch_dtype=torch.float32
    ).eval()
    template = (
        "photo, portrait of a person, {}, soft light, plain blue background, short brown hair"
    )
    tokens = token_ids(build_tokenizer(), [template.format(one), template.format(other)])
    with torch.no_grad():
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states[-2]
    position = (tokens[0] != tokens[1]).nonzero()[0]
    difference = (hidden[0, position] - hidden[1, position]).square().mean().sqrt()
    assert difference > 0.6 * hidden.std()


def test_invisible_attributes_are_ignored():
    scores = {name: torch.zeros(2, len(classes)) for name, classes in ATTRIBUTES.items()}
    hidden = torch.full((2, len(ATTRIBUTES)), -1)
    assert attribute_loss(scores, hidden).item() == 0
    targets = hidden.clone()
    targets[0, 0] = 0
    assert attribute_loss(scores, targets).item() == pytest.approx(np.log(5) / len(ATTRIBUTES))
    assert compute_accuracy(mark_correct(scores, targets)) == {"pose": 1.0}


def test_classifier_trains_and_accepts_any_size(small_world):
    torch.manual_seed(0)
    task = AttributeClassifierTask(AttributeClassifier(), small_world, batch=4)
    loss = task.losses(StepRNG(0, 0))["attributes"]
    loss.backward()
    assert torch.isfinite(loss)
    scores = task.classifier.eval()(torch.rand(2, 3, 128, 112))
    assert {name: tuple(value.shape) for name, value in scores.items()} == {
        name: (2, len(classes)) for name, classes in ATTRIBUTES.items()
    }


def test_a_clip_learns_the_facial_values_of_people(small_world, captions):
    torch.manual_seed(0)
    encoder = CLIPVisionModelWithProjection.from_pretrained(MINIATURE / "clip").float()
    text_encoder = CLIPTextModelWithProjection.from_pretrained(
        MINIATURE / "pipeline" / "text_encoder_2"
    ).float()
    task = ClipFacesTask(encoder, text_encoder, small_world, captions, small_world, batch=12)
    before = task.validate()["values"]
    parameters = [x for module in task.modules().values() for x in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for step in range(30):
        losses = task.losses(StepRNG(0, step))
        assert set(losses) == {"people", "values", "captions"}
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    after = task.validate()["values"]
    assert 0.15 < before < 0.35  # the mean is predicted
    assert after < 0.5 * before  # of the people it was trained on
