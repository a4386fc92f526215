"""InfiniteYou's files, and the projection of a face embedding to identity tokens."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from torch import Tensor, nn
from torch.nn.functional import normalize

from openpulid.errors import IdentityError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.io.checkpoints import explain_bad_weights, read_tensors
from openpulid.methods.controlnet import find_adapter_files
from openpulid.methods.ip_adapter.resampler import DIM_HEAD, build_resampler

FILES = ("image_proj_model.safetensors", "image_proj_model.bin")
"""Names of the projection's file; the last one is the published one."""
INFUSENET = "InfuseNetModel"
"""Published folder of InfuseNet, next to the projection."""
PREFIX = "image_proj."
"""Of the names in the projection's file."""


def find_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Return the file of the projection, and the folder of InfuseNet.

    Args:
        path: a folder with both, or the file next to the folder.

    Raises:
        WeightsError: One of them is missing.
    """
    return find_adapter_files(path, "InfiniteYou", FILES, INFUSENET)


class FaceProjection(nn.Module):
    """Face embedding -> identity tokens: a Resampler of one vector.

    The embedding is that of facexlib's ArcFace, which reads the face in BGR, of length 1.

    Args:
        resampler: diffusers' layer.
    """

    def __init__(self, resampler: IPAdapterPlusImageProjection) -> None:
        super().__init__()
        self.resampler = resampler.eval().requires_grad_(False)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], dtype: torch.dtype, dim_head: int = DIM_HEAD
    ) -> FaceProjection:
        """Load the published file.

        Args:
            path: the file.
            dtype: of the weights.
            dim_head: width of a head.

        Raises:
            WeightsError: The file is damaged.
        """
        with explain_bad_weights(f"{path} is no projection of InfiniteYou, or is damaged"):
            tensors = read_tensors(path, dtype, PREFIX)
            published = {name.removeprefix(PREFIX): x for name, x in tensors.items()}
            return cls(build_resampler(published, dim_head))

    @property
    def width(self) -> int:
        """D of the face embedding; 512 in the published files."""
        return int(self.resampler.proj_in.in_features)

    def require_output_width(self, width: int) -> None:
        """Raise WeightsError if the tokens do not have the width of a model's text tokens."""
        own_width = self.resampler.proj_out.out_features
        if own_width != width:
            raise WeightsError(
                f"this projection has tokens of width {own_width}, and InfuseNet reads tokens of "
                f"width {width}; use two files that were published together."
            )

    def encode(self, identity: Identity) -> Tensor:
        """Encode a face embedding; the embeddings of several reference images are averaged.

        Args:
            identity: with face embeddings alone, (1, n, D).

        Returns:
            (1, N, width of FLUX's text tokens).

        Raises:
            IdentityError: The identity is of another method.
        """
        if identity.id_cond.shape[-1] != self.width or identity.hidden:
            raise IdentityError(
                "InfiniteYou reads the embedding of facexlib's ArcFace, and this identity holds "
                "features for another method; create it again from the reference images with "
                "`pulid identify --preset flux --method infiniteyou`."
            )
        embedding = normalize(identity.id_cond.float(), dim=-1).mean(1, keepdim=True)
        tokens: Tensor = self.resampler(normalize(embedding, dim=-1).to(self.resampler.latents))
        return tokens
