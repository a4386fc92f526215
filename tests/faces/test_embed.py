"""Face embeddings for the ID loss: random views, and several recognition models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, max_pool2d

from openpulid.faces.align import TEMPLATE
from openpulid.faces.arcface import ARCFACE_TEMPLATE, arcface_crop
from openpulid.faces.embed import FaceEmbedder, crop_masked
from openpulid.faces.face import Face
from openpulid.faces.miniature import ResNetRecognition
from openpulid.io.image_grid import to_tensor
from openpulid.mini.train.loss_models import load_face_embedder
from openpulid.pipelines.presets import MINIATURE
from openpulid.world.gallery import render_portrait

SIDE = 96


def find(images: Tensor) -> list[Face]:
    """Find a face that fills the image."""
    box, mask = torch.tensor([0.0, 0.0, SIDE, SIDE]), torch.ones(1, SIDE, SIDE)
    return [Face(image, box, TEMPLATE * SIDE, 1.0, mask) for image in images]


def recognition(seed: int) -> ResNetRecognition:
    torch.manual_seed(seed)
    return ResNetRecognition(stem=4, widths=(8, 8, 8), depths=(1, 1, 1), dim=6)


def faces(seed: int, count: int = 3) -> Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_views_are_random_and_repeatable() -> None:
    embedder = FaceEmbedder(find, recognition(1))
    images = faces(1)
    plain = embedder(images).embeddings
    assert torch.equal(embedder(images).embeddings, plain)
    view = embedder(images, seeded()).embeddings
    assert torch.equal(embedder(images, seeded()).embeddings, view)
    for other in (plain, embedder(images, seeded(1)).embeddings):
        assert not torch.allclose(view, other, atol=1e-3)


def test_cosine_of_an_ensemble_is_the_mean() -> None:
    models = [recognition(seed) for seed in (1, 2)]
    one, other = faces(1), faces(2)

    def cosine(embedder: FaceEmbedder) -> Tensor:
        return cosine_similarity(embedder(one).embeddings, embedder(other).embeddings)

    alone = [cosine(FaceEmbedder(find, model)) for model in models]
    together = cosine(FaceEmbedder(find, *models))
    assert torch.allclose(together, (alone[0] + alone[1]) / 2, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)


@pytest.mark.parametrize("has_view", [False, True])
def test_gradients_reach_every_image(has_view: bool) -> None:
    embedder = FaceEmbedder(find, recognition(1), recognition(2))
    images = (0.3 + 0.4 * faces(1)).requires_grad_()
    target = embedder(faces(2)).embeddings
    embeddings = embedder(images, seeded() if has_view else None).embeddings
    cosine_similarity(embeddings, target).sum().backward()
    assert images.grad is not None and (images.grad.abs().sum((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("is_bf16", [False, True])
def test_outline_of_a_face_carries_gradient(is_bf16: bool) -> None:
    """The recognition models see no background, so they see an outline in the mask alone.

    Without the gradient of the mask, an adapter learns neither chin nor jaw from the ID loss.
    """
    embedder = load_face_embedder(MINIATURE, torch.device("cpu"))
    portraits = [render_portrait(1_000_000 + number) for number in range(4)]
    images = to_tensor(portraits)
    found = embedder(images)
    outside = max_pool2d(found.masks, 5, 1, 2) == 0
    gradients, embeddings = [], []
    for segment in (embedder.segment, None):
        embedder.segment = segment
        pixels = images.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            faces = embedder(pixels)
        values = faces.embeddings
        cosine_similarity(values, found.embeddings.flip(0)).sum().backward()
        gradients.append(pixels.grad * outside)
        embeddings.append(values)
        assert not faces.masks.requires_grad
    assert torch.allclose(*embeddings, atol=1e-5)
    shares = gradients[0].flatten(1).norm(dim=1) / pixels.grad.flatten(1).norm(dim=1)
    assert (shares > 0.02).all() and gradients[1].abs().max() < 1e-6


def test_texture_that_pleases_a_fixed_view_gains_less_in_others() -> None:
    """The reason for random views: an attack on the pixels of one view fails in the next."""
    model = recognition(1)
    target = FaceEmbedder(find, model)(faces(2, 1)).embeddings
    embedder = FaceEmbedder(find, model)
    gains = {}
    for name, has_view in (("fixed", False), ("random", True)):
        images = faces(1, 1)
        before = cosine_similarity(embedder(images).embeddings, target)
        noise = torch.zeros_like(images).requires_grad_()
        optimizer = torch.optim.Adam([noise], lr=0.01)
        for step in range(20):
            generator = seeded(step) if has_view else None
            loss = -cosine_similarity(embedder(images + noise, generator).embeddings, target).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        attacked = (images + noise).detach()
        seen = cosine_similarity(embedder(attacked).embeddings, target) - before
        other_views = torch.stack(
            [
                cosine_similarity(embedder(attacked, seeded(100 + k)).embeddings, target)
                - cosine_similarity(embedder(images, seeded(100 + k)).embeddings, target)
                for k in range(8)
            ]
        ).mean()
        gains[name] = float(other_views / seen)
    assert gains["random"] > gains["fixed"]


def test_crops_of_both_recognition_models() -> None:
    images, masks = faces(1), torch.ones(3, 1, SIDE, SIDE)
    landmarks = (TEMPLATE * SIDE).expand(3, 5, 2)
    for crop, size, low in ((crop_masked, 48, 0.0), (arcface_crop, 112, -1.0)):
        plain = crop(images, masks, landmarks)
        view = crop(images, masks, landmarks, seeded())
        assert plain.shape == view.shape and plain.shape[-1] >= size
        assert view.min() >= low - 1e-5 and view.max() <= 1 + 1e-5
        assert not torch.allclose(plain, view, atol=0.05)
    assert ARCFACE_TEMPLATE.shape == (5, 2)
