"""The miniature's autoencoder starts as the best linear code and works as an `AutoencoderKL`."""

import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline

from openpulid.diffusion.patch_vae import PatchAutoencoderKL
from openpulid.io.checkpoints import module_fingerprint
from openpulid.world import Person, Scene, render


@pytest.fixture(scope="module")
def images():
    scenes = [Scene(), Scene(pose="left"), Scene(background="red"), Scene(hat="beanie")]
    return 2 * render([Person.from_seed(k) for k in range(4)], scenes, size=48).image - 1


@pytest.fixture(scope="module")
def vae(images):
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(
        block_out_channels=(8, 8, 16, 16), latent_channels=12, norm_num_groups=4, sample_size=48
    )
    vae.start_from(images)
    return vae.eval()


@torch.no_grad()
def test_initialization_equals_principal_components(vae, images):
    latents = vae.encode(images).latent_dist.mode()
    assert latents.shape == (4, 12, 6, 6)
    assert latents.square().mean().item() == pytest.approx(1, abs=0.02)
    error = (vae.decode(latents).sample - images).square().mean().sqrt().item()
    # the same code by singular values: 12 components of 192
    patches = torch.nn.functional.pixel_unshuffle(images, 8).permute(0, 2, 3, 1).flatten(0, 2)
    color = patches.mean(0).reshape(3, 64).mean(1).repeat_interleave(64)
    centered = patches - color
    best = torch.linalg.svdvals(centered)[12:].square().sum().div(centered.numel()).sqrt().item()
    assert error == pytest.approx(best, rel=1e-3)


def test_gradients_reach_network_and_projection(vae, images):
    distribution = vae.encode(images).latent_dist
    vae.decode(distribution.mode()).sample.square().mean().backward()
    for parameter in (
        vae.patch_in.weight,
        vae.patch_out.weight,
        vae.encoder.conv_out.weight,
        vae.decoder.conv_out.weight,
    ):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    vae.zero_grad()


def test_pipelines_see_factor_eight_and_files_round_trip(vae, images, tmp_path, caplog):
    assert isinstance(vae, AutoencoderKL)
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 8 and vae.config.latent_channels == 12
    vae.save_pretrained(tmp_path)
    loaded = PatchAutoencoderKL.from_pretrained(tmp_path)
    assert not caplog.records
    with torch.no_grad():
        assert torch.equal(
            loaded.encode(images).latent_dist.mode(), vae.encode(images).latent_dist.mode()
        )


@torch.no_grad()
def test_squares_of_latents_are_one_token_of_flux(vae, images):
    """With depth to space, FLUX's packing gives each token the values of one patch."""
    squares = vae.with_latent_patch(2)
    latents = vae.encode(images).latent_dist.mode()
    rearranged = squares.encode(images).latent_dist.mode()
    assert rearranged.shape == (4, 3, 12, 12) and squares.config.latent_channels == 3
    assert 2 ** (len(squares.config.block_out_channels) - 1) == 4
    tokens = FluxPipeline._pack_latents(rearranged, 4, 3, 12, 12)
    assert torch.equal(tokens, latents.flatten(2).transpose(1, 2))
    assert torch.equal(squares.decode(rearranged).sample, vae.decode(latents).sample)
    assert module_fingerprint(squares) == module_fingerprint(vae)
