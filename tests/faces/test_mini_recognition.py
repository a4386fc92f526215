"""The miniature's face recognition models."""

import pytest
import torch

from openpulid.faces.miniature import RECOGNITION_MODELS
from openpulid.io.checkpoints import load_module, save_module


@pytest.mark.parametrize("name", RECOGNITION_MODELS)
def test_recognition_shapes_sizes_and_gradient(name):
    torch.manual_seed(0)
    network = RECOGNITION_MODELS[name]().eval()
    assert 400_000 < sum(p.numel() for p in network.parameters()) < 1_000_000
    crops = torch.rand(2, 3, 64, 64).requires_grad_()
    embedding = network(crops)
    assert embedding.shape == (2, 128) and embedding.dtype == torch.float32
    embedding.square().sum().backward()
    assert crops.grad.abs().sum() > 0


@pytest.mark.parametrize("name", RECOGNITION_MODELS)
def test_recognition_file_round_trip(name, tmp_path):
    torch.manual_seed(0)
    network = RECOGNITION_MODELS[name](dim=32).eval()
    path = save_module(network, tmp_path / "network.safetensors", {"seed": 0})
    loaded = load_module(RECOGNITION_MODELS[name], path)
    crops = torch.rand(2, 3, 64, 64)
    assert torch.equal(network(crops), loaded(crops))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_recognition_models_have_different_architectures():
    assert len({type(build()) for build in RECOGNITION_MODELS.values()}) == 3
