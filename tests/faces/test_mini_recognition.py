import pytest
import torch

from openpulid.faces.mini_recognition import RECOGNITION_MODELS
from openpulid.io.checkpoints import load_module, save_module


@pytest.mark.parametrize("name", RECOGNITION_MODELS)
def test_shapes_sizes_and_a_gradient_to_the_picture(name):
    torch.manual_seed(0)
    network = RECOGNITION_MODELS[name]().eval()
    assert 400_000 < sum(p.numel() for p in network.parameters()) < 1_000_000
    crops = torch.rand(2, 3, 64, 64).requires_grad_()
    embedding = network(crops)
    assert embedding.shape == (2, 128) and embedding.dtype == torch.float32
    embedding.square().sum().backward()
    assert crops.grad.abs().sum() > 0


@pytest.mark.parametrize("name", RECOGNITION_MODELS)
def test_a_file_gives_the_same_network_back(name, tmp_path):
    torch.manual_seed(0)
    network = RECOGNITION_MODELS[name](dim=32).eval()
    path = save_module(network, tmp_path / "network.safetensors", {"seed": 0})
    again = load_module(RECOGNITION_MODELS[name], path)
    crops = torch.rand(2, 3, 64, 64)
    assert torch.equal(network(crops), again(crops))
    assert not again.training and not any(p.requires_grad for p in again.parameters())


def test_the_three_are_different_networks():
    assert len({type(build()) for build in RECOGNITION_MODELS.values()}) == 3
