"""The miniature's autoencoder: `AutoencoderKL` with a linear bypass around a small network."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

import torch

# Pipelines look up ModelMixin in the module of a component.
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch import Tensor, nn
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

NUM_FOLDED = 2
"""Levels that are a pixel-unshuffle: convolutions at full resolution are slow and gain little."""


class PatchAutoencoderKL(AutoencoderKL):
    """`AutoencoderKL` with a linear projection of patches in parallel to the network.

    The first levels of the network are a pixel-unshuffle. The projection (`patch_in` and
    `patch_out`, 8 x 8 pixels to one latent and back) starts as the principal components of the
    images, and the last layer of the network starts at zero. So training begins at the best linear
    code and only learns what is not linear. To pipelines this is an `AutoencoderKL` of factor 8.

    FLUX packs two by two latents into a token. With a `latent_patch` of 2 the values of a patch are
    a square of two by two latents, so that a token is one patch (depth to space); the factor is
    then 4, with a quarter of the channels. The weights are the same.

    Args:
        block_out_channels: four widths, as pipelines count levels; the first `folded` are not used.
            With a `latent_patch` of 2 three widths.
        latent_channels: as in `AutoencoderKL`.
        norm_num_groups: as in `AutoencoderKL`.
        sample_size: as in `AutoencoderKL`.
        scaling_factor: as in `AutoencoderKL`.
        shift_factor: as in `AutoencoderKL`, which pipelines of FLUX read.
        force_upcast: as in `AutoencoderKL`.
        folded: levels that are a pixel-unshuffle. With 1 the last convolutions run at half
            resolution.
        overlap: pixels by which a patch of the projection overlaps each neighbor. With 0 the
            borders of patches are visible.
        latent_patch: side of the square of latents that a patch becomes.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: Sequence[int] = (48, 48, 96, 128),
        latent_channels: int = 20,
        norm_num_groups: int = 8,
        sample_size: int = 96,
        scaling_factor: float = 1.0,
        force_upcast: bool = False,
        folded: int = NUM_FOLDED,
        overlap: int = 0,
        shift_factor: float = 0.0,
        latent_patch: int = 1,
    ) -> None:
        fold = 2**folded
        patch = latent_patch * 2 ** (len(block_out_channels) - 1)
        widths = tuple(block_out_channels[-int(log2(2 * patch / fold)) :])
        patch_channels = latent_channels * latent_patch**2
        super().__init__(
            in_channels=3 * fold**2,
            out_channels=3 * fold**2,
            block_out_channels=widths,
            layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            latent_channels=patch_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            force_upcast=force_upcast,
        )
        # The parent has registered its own arguments; files and pipelines need those of this class.
        config = {
            "block_out_channels": tuple(block_out_channels),
            "latent_channels": latent_channels,
            "norm_num_groups": norm_num_groups,
            "sample_size": sample_size,
            "scaling_factor": scaling_factor,
            "force_upcast": force_upcast,
            "folded": folded,
            "overlap": overlap,
            "shift_factor": shift_factor,
            "latent_patch": latent_patch,
        }
        self._internal_dict = FrozenDict(config)
        self.fold = fold
        self.patch_in = nn.Conv2d(
            3, patch_channels, patch + 2 * overlap, stride=patch, padding=overlap
        )
        self.patch_out = nn.ConvTranspose2d(
            patch_channels, 3, patch + 2 * overlap, stride=patch, padding=overlap
        )
        for last in (self.encoder.conv_out, self.decoder.conv_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def _encode(self, x: Tensor) -> Tensor:
        deep = self.quant_conv(self.encoder(pixel_unshuffle(x, self.fold)))
        mean, logvar = deep.chunk(2, dim=1)
        moments = torch.cat([mean + self.patch_in(x), logvar], 1)
        return pixel_shuffle(moments, self.config.latent_patch)

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        z = pixel_unshuffle(z, self.config.latent_patch)
        decoded = super()._decode(z, return_dict=True)
        decoded.sample = pixel_shuffle(decoded.sample, self.fold) + self.patch_out(z)
        return decoded if return_dict else (decoded.sample,)

    def with_latent_patch(self, latent_patch: int) -> PatchAutoencoderKL:
        """Return the same autoencoder with its latents in squares of this side.

        Args:
            latent_patch: 1, or 2 for one token of FLUX per patch.
        """
        dropped_levels = int(log2(latent_patch))
        config = {
            **self.config,
            "block_out_channels": tuple(self.config.block_out_channels[dropped_levels:]),
            "latent_channels": self.config.latent_channels // latent_patch**2,
            "latent_patch": latent_patch,
        }
        vae = PatchAutoencoderKL.from_config(config).to(self.device)
        vae.load_state_dict(self.state_dict())
        return vae.train(self.training).requires_grad_(self.patch_in.weight.requires_grad)

    @torch.no_grad()
    def start_from(self, images: Tensor) -> None:
        """Set the projection to the principal components of images (B, 3, H, W) in [-1, 1].

        The latents have a mean square of 1. The standard deviation of a component is proportional
        to the square root of its natural one: strong components dominate, as in the image, but weak
        ones are not lost in the first noise.
        """
        patch, channels = self.patch_in.stride[0], self.patch_in.out_channels
        patches = (
            pixel_unshuffle(images.double(), patch).permute(0, 2, 3, 1).flatten(0, 2)
        )  # (N, 3 * patch * patch)
        # The mean is one number per color, as the bias of a transposed convolution has it.
        color = patches.mean(0).reshape(3, patch * patch).mean(1)
        mean = color.repeat_interleave(patch * patch)
        variance, basis = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        basis, scale = basis[:, -channels:], variance[-channels:].sqrt().sqrt()
        scale = scale / scale.square().mean().sqrt()  # latents of mean square 1
        shrink = scale / variance[-channels:].sqrt()
        kernel = basis.T.reshape(channels, 3, patch, patch)
        kernel = pad(kernel, [self.config.overlap] * 4)
        self.patch_in.weight.copy_(kernel * shrink[:, None, None, None])
        _bias(self.patch_in).copy_(-(basis.T @ mean) * shrink)
        self.patch_out.weight.copy_(kernel / shrink[:, None, None, None])
        _bias(self.patch_out).copy_(color)
        self.quant_conv.bias[:channels].zero_()  # the network adds nothing at the start
        self.quant_conv.bias[channels:].fill_(-6.0)  # log variance: nearly exact at the start


def _bias(layer: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
