"""The miniature's autoencoder: diffusers' `AutoencoderKL` with a linear way around a small network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  (pipelines look for ModelMixin in a component's module)
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

NUM_FOLDED = 2
"""Levels of the pyramid that are a pixel-unshuffle: convolutions at full resolution cost a CPU most and give least."""


class PatchAutoencoderKL(AutoencoderKL):
    """`AutoencoderKL` whose first two levels are a pixel-unshuffle, with a linear projection of patches beside the network.

    The projection (`patch_in`, `patch_out`: 8 x 8 pixels to one latent and back) starts as the
    principal components of the pictures, and the network's last layer starts at zero: training
    begins where the best linear code ends and spends its time on what is not linear. Everything
    else, the stock pipelines included, sees an `AutoencoderKL` of factor 8.

    Args:
        block_out_channels: four widths, as the pipelines count levels; the first two are not used.
        latent_channels, norm_num_groups, sample_size, scaling_factor: as in `AutoencoderKL`.
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
    ) -> None:
        widths = tuple(block_out_channels[NUM_FOLDED:])
        fold, patch = 2**NUM_FOLDED, 2 ** (len(block_out_channels) - 1)
        super().__init__(
            in_channels=3 * fold**2, out_channels=3 * fold**2, block_out_channels=widths, layers_per_block=1,
            down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
            latent_channels=latent_channels, norm_num_groups=norm_num_groups, sample_size=sample_size,
            scaling_factor=scaling_factor, force_upcast=force_upcast,
        )  # fmt: skip
        # the parent has registered what it was given; files and pipelines must read what this class
        # was given
        own = {"block_out_channels": tuple(block_out_channels), "latent_channels": latent_channels,
               "norm_num_groups": norm_num_groups, "sample_size": sample_size, "scaling_factor": scaling_factor,
               "force_upcast": force_upcast}  # fmt: skip
        self._internal_dict = FrozenDict(own)
        self.fold = fold
        self.patch_in = nn.Conv2d(3, latent_channels, patch, stride=patch)
        self.patch_out = nn.ConvTranspose2d(latent_channels, 3, patch, stride=patch)
        for last in (self.encoder.conv_out, self.decoder.conv_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def _encode(self, x: Tensor) -> Tensor:
        deep = self.quant_conv(self.encoder(pixel_unshuffle(x, self.fold)))
        mean, logvar = deep.chunk(2, dim=1)
        return torch.cat([mean + self.patch_in(x), logvar], 1)

    def _decode(self, z: Tensor, return_dict: bool = True) -> Any:
        decoded = super()._decode(z, return_dict=True)
        decoded.sample = pixel_shuffle(decoded.sample, self.fold) + self.patch_out(z)
        return decoded if return_dict else (decoded.sample,)

    @torch.no_grad()
    def start_from(self, pictures: Tensor) -> None:
        """Sets the projection to the principal components of (B, 3, H, W) pictures in [-1, 1], latents of deviation about 1.

        A component's deviation is the square root of its natural one, rescaled: strong components
        lead, as in the picture, and weak ones are not lost under the first noise.
        """
        patch, channels = self.patch_in.stride[0], self.config.latent_channels
        patches = (
            pixel_unshuffle(pictures.double(), patch).permute(0, 2, 3, 1).flatten(0, 2)
        )  # (N, 3 * patch * patch)
        # around a mean that a transposed convolution's bias can say: one number per colour
        color = patches.mean(0).reshape(3, patch * patch).mean(1)
        mean = color.repeat_interleave(patch * patch)
        variance, basis = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        basis, scale = basis[:, -channels:], variance[-channels:].sqrt().sqrt()
        scale = scale / scale.square().mean().sqrt()  # of the latents: mean square 1
        shrink = scale / variance[-channels:].sqrt()
        kernel = basis.T.reshape(channels, 3, patch, patch)
        self.patch_in.weight.copy_(kernel * shrink[:, None, None, None])
        _bias(self.patch_in).copy_(-(basis.T @ mean) * shrink)
        self.patch_out.weight.copy_(kernel / shrink[:, None, None, None])
        _bias(self.patch_out).copy_(color)
        self.quant_conv.bias[:channels].zero_()  # the network adds nothing yet
        self.quant_conv.bias[channels:].fill_(-6.0)  # log variance: nearly exact to begin with


def _bias(layer: nn.Conv2d | nn.ConvTranspose2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias
