"""The miniature's IP-Adapter for a style image: its pairs, captions, training and file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPVisionModelWithProjection

from openpulid.methods.ip_adapter.ip_adapter import IPAdapter
from openpulid.mini.train.baseline_task import BaselineTask
from openpulid.mini.train.baselines.ip_adapter import style
from openpulid.mini.train.build import select_stages
from openpulid.mini.train.style_data import ClipEmbeddingRows, StyleImages, StylePairs
from openpulid.pipelines.factory import load_pipeline
from openpulid.pipelines.presets import MINIATURE, mini
from openpulid.training.pulid.models import SDXLModel
from openpulid.training.pulid.recipes import find_recipe
from openpulid.training.rng import StepRNG
from openpulid.world import ATTRIBUTES, remove_look

LOOK = ("style", "light", "background", "pattern")
CAPTION = "color photo, a person, smiling, soft light, teal striped background, red shirt"


def describe(*looks: tuple[int, int, int, int]) -> np.ndarray:
    """Return the attributes of images with these classes of `LOOK`; all others are 0."""
    attributes = np.zeros((len(looks), len(ATTRIBUTES)), dtype=np.int8)
    for name, classes in zip(LOOK, zip(*looks, strict=True), strict=True):
        attributes[:, list(ATTRIBUTES).index(name)] = classes
    return attributes


def test_style_image_shows_another_person_in_the_same_style() -> None:
    people = np.array([4, 4, 9, 2, 9, 4, 2, 7])
    attributes = describe(
        (0, 1, 2, 0),
        (0, 1, 2, 0),
        (0, 1, 2, 0),
        (0, 1, 2, 0),
        (1, -1, -1, 0),
        (1, -1, -1, 0),
        (0, 5, 2, 0),  # no other image has its light
        (3, 0, 0, 0),  # no other image has its style
    )
    pairs = StylePairs(people, attributes)
    rows = torch.arange(8).repeat(40)
    sampled = pairs.sample(rows, StepRNG(0, 0))
    partners = [set(sampled[rows == row].tolist()) for row in range(8)]
    assert partners == [{2, 3}, {2, 3}, {0, 1, 3}, {0, 1, 2}, {5}, {4}, {0, 1, 2}, {7}]
    assert torch.equal(sampled, pairs.sample(rows, StepRNG(0, 0)))
    assert not torch.equal(sampled, pairs.sample(rows, StepRNG(0, 1)))


def test_many_pairs_share_the_look_and_not_the_person() -> None:
    random = np.random.default_rng(0)
    people = random.integers(0, 30, 600)
    attributes = describe(*random.integers(0, 2, (600, 4)).tolist())
    rows = torch.arange(600)
    sampled = StylePairs(people, attributes).sample(rows, StepRNG(0, 0)).numpy()
    assert (attributes[sampled] == attributes).all()
    assert (people[sampled] != people).all()


def test_look_is_removed_from_a_caption() -> None:
    assert remove_look(CAPTION) == "a person, smiling, red shirt"
    assert remove_look("portrait , pencil sketch , looking up") == "portrait, looking up"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(mini(), torch.device("cpu"))


@pytest.fixture(scope="module")
def encoder() -> Any:
    network = CLIPVisionModelWithProjection.from_pretrained(MINIATURE / "clip").float().eval()
    return network.requires_grad_(False)


@pytest.fixture(scope="module")
def images(small_world: Any, pipe: Any, encoder: Any) -> StyleImages:
    """Twelve images of four people, with random latents."""
    random = torch.Generator().manual_seed(3)
    shape = (len(small_world), *SDXLModel(pipe).latent_shape())
    latents = torch.randn(shape, generator=random)
    tokens = torch.as_tensor(pipe.tokenizer([CAPTION]).input_ids)
    return StyleImages(
        small_world,
        SimpleNamespace(
            rows=lambda rows, device: (latents[rows], torch.ones(len(rows), 1, 12, 12))
        ),
        SimpleNamespace(
            tokens=tokens[None], rows=lambda rows, variants: tokens.expand(len(rows), -1)
        ),
        ClipEmbeddingRows(small_world, encoder),
        pipe.tokenizer,
        batch_size=4,
        with_images=False,
    )


def test_batch_has_embeddings_of_other_people_and_short_captions(
    images: StyleImages, encoder: Any
) -> None:
    people = images.data.people
    rows = StepRNG(0, 0).indices(len(images.data), 4)
    partners = images.sample_references(rows, StepRNG(0, 0))
    assert (people[partners] != people[rows]).all()
    batch = images.batch(StepRNG(0, 0))
    expected, _ = images.features.rows(partners.numpy())
    assert torch.equal(batch.id_cond, expected) and not batch.hidden
    captions = {caption for step in range(8) for caption in images.batch(StepRNG(0, step)).prompts}
    assert len(captions) == 2 and {"style" in x or "photo" in x for x in captions} == {True, False}


def test_adapter_trains_and_its_file_keeps_the_result(
    images: StyleImages, pipe: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    baseline = style(pipe, 128)
    base = {name: x.clone() for name, x in pipe.unet.state_dict().items()}
    batch = images.batch(StepRNG(0, 0))
    source: Any = SimpleNamespace(batch=lambda rng: batch)
    idle = type(pipe)(**pipe.components)
    task = BaselineTask(find_recipe("mini_stage1"), SDXLModel(idle), baseline, source, source)
    trained = list(baseline.trained.parameters())
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    losses = []
    for _ in range(6):  # the same noise at each step
        loss = task.losses(StepRNG(0, 0))["diffusion"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.995
    assert all(torch.equal(x, base[name]) for name, x in pipe.unet.state_dict().items())

    path = baseline.save(tmp_path / "style", pipe)
    loaded = IPAdapter.load(path)
    tensors = loaded.parts["image_proj"]
    assert {name: tuple(x.shape) for name, x in tensors.items()} == {
        "proj.weight": (4 * pipe.unet.config.cross_attention_dim, 128),
        "proj.bias": (4 * pipe.unet.config.cross_attention_dim,),
        "norm.weight": (pipe.unet.config.cross_attention_dim,),
        "norm.bias": (pipe.unet.config.cross_attention_dim,),
    }
    features = baseline.identities(batch)[0]
    tokens = [
        method.image_tokens(method.layers_for(pipe).projection, features)
        for method in (baseline.method, loaded)
    ]
    assert torch.allclose(*tokens, atol=0.02) and tokens[1].shape[1] == 4
    baseline.method.detach(idle)


def test_stage_is_selected_by_its_name() -> None:
    assert [stage.name for stage in select_stages(["style"])] == ["style"]
