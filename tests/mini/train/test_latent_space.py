"""A U-Net that continues on the latents of another autoencoder."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from openpulid.errors import WeightsError
from openpulid.mini.train.build_context import BuildContext
from openpulid.mini.train.latent_space import LinearMap, encode, move_unet
from tests.support import mini_networks as networks


def test_map_finds_the_linear_relation_of_two_latents():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 4, 4, generator=generator)
    weight = torch.randn(2, 3, generator=generator)
    y = torch.einsum("ij,njhw->nihw", weight, x) + torch.tensor([1.0, -2.0])[:, None, None]
    fitted = LinearMap.fit(x, y)
    torch.testing.assert_close(fitted.weight, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(fitted.bias, torch.tensor([1.0, -2.0]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_moved_unet_predicts_the_same_in_rotated_latents():
    """The new autoencoder's latents are those of the old one, rotated."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(64, 3, 16, 16, generator=generator) * 2 - 1
    old = networks.small_vae()
    old.start_from(images)
    new = deepcopy(old)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    new.patch_in.weight.copy_(torch.einsum("ij,jckl->ickl", rotation, old.patch_in.weight))
    new.patch_in.bias.copy_(rotation @ old.patch_in.bias)
    unet = networks.small_unet()
    moved = deepcopy(unet)
    move_unet(moved, old, new, images)

    def predict(network, x):
        added = {"text_embeds": torch.zeros(2, 128), "time_ids": torch.zeros(2, 6)}
        text = torch.ones(2, 3, 64)
        return network(x, 500, encoder_hidden_states=text, added_cond_kwargs=added).sample

    x = torch.randn(2, 4, 8, 8, generator=generator)
    rotated = torch.einsum("ij,njhw->nihw", rotation, x)
    expected = torch.einsum("ij,njhw->nihw", rotation, predict(unet, x))
    torch.testing.assert_close(predict(moved, rotated), expected, atol=1e-5, rtol=1e-4)
    assert encode(new, images).shape == (64, 4, 2, 2)


def test_missing_pipeline_is_reported(tmp_path):
    context = BuildContext(tmp_path, tmp_path, torch.device("cpu"), begin=tmp_path / "none")
    with pytest.raises(WeightsError, match="none"):
        context.load_first_model(type(networks.small_vae()), "vae")
