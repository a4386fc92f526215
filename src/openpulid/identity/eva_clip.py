"""EVA02-CLIP's vision encoder, with hidden states, on top of timm's EVA."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.models.eva import Eva, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize
from torchvision.transforms import Normalize

from openpulid.io.checkpoints import explain_bad_weights, load_state, read_tensors

LEVELS = 5
PREFIX = "visual."
"""Prefix of the vision encoder in the names of the published file."""


class VisionEncoder(nn.Module):
    """EVA02-CLIP's vision encoder; the defaults are EVA02-CLIP-L-14-336 (arXiv 2303.15389).

    Args:
        img_size, patch_size: in pixels.
        embed_dim: D, width of the hidden states.
        depth, num_heads: number of blocks, and of heads in each.
        num_classes: E, width of the embedding.
        levels: the blocks, counted from 1, whose outputs are returned as hidden states. By default
            five in even steps that leave out about the last sixth (4, 8, 12, 16, 20 of 24).
        ref_grid: patches per side in the training of the rotary positions; None for this model's.
    """

    def __init__(
        self,
        img_size: int = 336,
        patch_size: int = 14,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        num_classes: int = 768,
        levels: Sequence[int] | None = None,
        ref_grid: int | None = 16,
    ) -> None:
        super().__init__()
        levels = (
            [-(-depth * i // (LEVELS + 1)) for i in range(1, LEVELS + 1)]
            if levels is None
            else list(levels)
        )
        if (
            len(levels) != LEVELS
            or levels != sorted(set(levels))
            or not 1 <= levels[0] <= levels[-1] <= depth
        ):
            raise ValueError(
                f"levels must be {LEVELS} increasing numbers from 1 to {depth}, got {levels}"
            )
        self.config: dict[str, Any] = {
            "img_size": img_size,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "num_classes": num_classes,
            "levels": levels,
            "ref_grid": ref_grid,
        }
        self.img_size = img_size
        self.levels = levels
        self.visual = Eva(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            mlp_ratio=4 * 2 / 3,
            qkv_fused=False,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
            use_rot_pos_emb=True,
            ref_feat_shape=ref_grid and (ref_grid, ref_grid),
            global_pool="token",
        )

    @classmethod
    def from_published(
        cls, file: str | os.PathLike[str], dtype: torch.dtype = torch.float32
    ) -> VisionEncoder:
        """Load EVA02-CLIP-L-14-336 from its published file.

        Args:
            file: `EVA02_CLIP_L_336_psz14_s6B.pt`, or the same tensors as safetensors.
            dtype: of the weights; they are cast on reading, one at a time. The text encoder of the
                file is not read.

        Raises:
            WeightsError: there is no such file, or it belongs to another model.
        """
        # initializing 304 million numbers takes longer than reading them
        with init_empty_weights(include_buffers=False):
            encoder = cls()
        encoder.load_published(read_tensors(file, dtype, PREFIX), os.fspath(file), dtype)
        return encoder.eval().requires_grad_(False)

    def load_published(
        self,
        state: Mapping[str, Tensor],
        label: str = "this state",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Load `visual.*` of an EVA-CLIP state with its published names.

        Args:
            state: the tensors.
            label: how messages call them.
            dtype: of the weights.

        Raises:
            WeightsError: a tensor is missing, unexpected or of another shape.
        """
        weights = {
            name: value.to(dtype) for name, value in state.items() if name.startswith(PREFIX)
        }
        message = f"{label} does not fit this vision encoder"
        with explain_bad_weights(message):
            converted = checkpoint_filter_fn(weights, self.visual)
        load_state(self.visual, converted, message, assign=True)

    def prepare(self, images: Tensor) -> Tensor:
        """Resize (bicubic) and normalize with CLIP's mean and standard deviation.

        Args:
            images: (B, 3, H, W) in [0, 1].

        Returns:
            (B, 3, S, S).
        """
        if images.shape[-2:] != (self.img_size, self.img_size):
            size = (self.img_size, self.img_size)
            images = interpolate(images, size, mode="bicubic", antialias=True)
        return normalize_for_clip(images)

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return embedding and hidden states.

        Args:
            pixels: (B, 3, S, S) from `prepare`.

        Returns:
            (B, E) of norm 1, and five hidden states (B, 1 + N, D), the class token first.
        """
        last, levels = self.visual.forward_intermediates(
            pixels,
            indices=[level - 1 for level in self.levels],
            return_prefix_tokens=True,
            output_fmt="NLC",
        )
        hidden = [torch.cat([prefix, patches], dim=1) for patches, prefix in levels]
        return normalize(self.visual.forward_head(last).float(), dim=-1), hidden


def normalize_for_clip(images: Tensor) -> Tensor:
    """Normalize images (..., 3, H, W) in [0, 1] by CLIP's mean and standard deviation."""
    pixels: Tensor = Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)(images)
    return pixels
