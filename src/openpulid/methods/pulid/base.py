"""What PuLID's adapters for SDXL and FLUX share: weights, and the identity encoder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from openpulid.errors import IdentityError, OptionError, WeightsError
from openpulid.identity.identity import find_mismatched_models
from openpulid.io.checkpoints import (
    explain_bad_weights,
    load_state,
    parse_config,
    read_optional_metadata,
    read_tensors,
    save_tensors,
)
from openpulid.io.hub import AURAFACE
from openpulid.methods.adapter import Adapter
from openpulid.methods.level_mapper import NUM_LEVELS
from openpulid.methods.pulid.encoders import IDEncoder, IDFormer
from openpulid.methods.pulid.masks import Person, encode_people

UNRECORDED_MODELS = ("glintr100", "recognition-encoder")
"""The face recognition models of adapters whose files record none: antelopev2's, with which the
published adapters were trained, and the miniature's."""


@dataclass(frozen=True)
class AdapterMetadata:
    """What the header of an adapter's file says; published files have nothing there.

    Attributes:
        entries: of the header.
        message: of the error for a damaged entry.
    """

    entries: Mapping[str, str]
    message: str

    @classmethod
    def read(cls, path: str | os.PathLike[str], message: str) -> AdapterMetadata:
        """Read a file's header; v1's `.bin` has none."""
        return cls(read_optional_metadata(path), message)

    def sizes(self, name: str) -> dict[str, Any]:
        """Return the sizes in an entry.

        Raises:
            WeightsError: The entry is damaged.
        """
        return parse_config(self.entries.get(name, "{}"), self.message)

    def explain(self) -> AbstractContextManager[None]:
        """Turn errors of damaged weights into a WeightsError with the message."""
        return explain_bad_weights(self.message)

    def models(self) -> dict[str, str]:
        """Return name -> hash of the face models used in training."""
        return {name: str(value) for name, value in self.sizes("models").items()}


PuLIDAdapter = TypeVar("PuLIDAdapter", bound="PuLIDBase")


class PuLIDBase(Adapter, nn.Module):
    """An identity encoder and attention layers, trained for one base model.

    Attributes:
        models: name -> hash of the face models used in training. Published files do not record
            them.
    """

    slot: ClassVar[str] = "identity"
    replaces: ClassVar[bool] = True

    def __init__(self) -> None:
        nn.Module.__init__(self)
        Adapter.__init__(self)
        self.models: dict[str, str] = {}

    @property
    def encoder(self) -> IDEncoder | IDFormer:
        """Identity features -> tokens."""
        raise NotImplementedError

    # --- weights

    def layer_sizes(self) -> dict[str, int]:
        """Return what the shapes of the layers' tensors do not tell about them."""
        return {}

    def save(
        self, path: str | os.PathLike[str], metadata: Mapping[str, object] | None = None
    ) -> Path:
        """Write one safetensors file with the published names, and the sizes as metadata.

        Args:
            path: of the file; its folder is created.
            metadata: additional entries of the file's header.

        Returns:
            The path.

        Raises:
            OutputError: The file cannot be written; an existing one is as it was.
        """
        header = {key: str(value) for key, value in (metadata or {}).items()}
        header["encoder"] = type(self.encoder).__name__
        header["config"] = json.dumps(self.encoder.config)
        if sizes := self.layer_sizes():
            header["layers"] = json.dumps(sizes)
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        return save_tensors(tensors, path, header)

    @staticmethod
    def read(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Read an adapter's file in one dtype.

        Raises:
            WeightsError: The file does not exist, or cannot be read.
        """
        if not Path(path).is_file():
            raise WeightsError(f"{path} does not exist; pass the adapter's file.")
        return read_tensors(path, dtype)

    def load_weights(self: PuLIDAdapter, state: Mapping[str, Tensor]) -> PuLIDAdapter:
        """Replace all weights, and switch to eval mode.

        Raises:
            WeightsError: A name is missing or unexpected, or a shape differs; the message has the
                first.
        """
        load_state(
            self, state, "these are not the weights of this adapter, name its own file", assign=True
        )
        return self.eval()

    # --- compatibility

    def require(self, models: Mapping[str, str]) -> None:
        """Raise OptionError if the face models differ from the ones used in training.

        A published file records none; it was trained with antelopev2. The miniature's files record
        none either, and its features have other widths than published adapters read.

        Args:
            models: name -> hash of the models that analyze the reference images; empty if they are
                unknown, which is accepted by an adapter that records none.
        """
        if models and not self.models and not any(name in models for name in UNRECORDED_MODELS):
            raise OptionError(
                "this adapter was trained with antelopev2, whose embeddings differ from those of "
                f"{' and '.join(sorted(models))}; leave out --faces, or pass an adapter that was "
                "trained with these face models."
            )
        mismatched = find_mismatched_models(self.models, models) if self.models else []
        if mismatched:
            pack = "the insightface pack used in training (--faces)"
            if AURAFACE in self.models:
                pack = "--faces open, as in training"
            raise OptionError(
                f"this adapter was trained with {' and '.join(sorted(self.models))}, but the "
                f"current {' and '.join(mismatched)} differs; pass {pack}, or another adapter."
            )

    # --- tokens

    def encode(self, id_cond: Tensor, hidden: Sequence[Tensor], mix: bool = False) -> Tensor:
        """Encode identity features to tokens, with gradient.

        Args:
            id_cond: (B, C), or (B, n, C) for n reference images.
            hidden: five times (B, n * (1 + N), D).
            mix: v1 only: further reference images add all their tokens, not only those of their
                embeddings.

        Returns:
            (B, T, width).

        Raises:
            OptionError: `mix` with another encoder than v1's.
            IdentityError: The features have other sizes than the encoder reads.
        """
        if mix and not isinstance(self.encoder, IDEncoder):
            raise OptionError(
                "mix is only available for PuLID v1; v1.1 always reads all of every image."
            )
        self._check_features(id_cond, hidden)
        reference = next(self.encoder.parameters())
        options = {"mix": True} if mix else {}
        levels = [level.to(reference) for level in hidden]
        tokens: Tensor = self.encoder(id_cond.to(reference), levels, **options)
        return tokens

    def _check_features(self, id_cond: Tensor, hidden: Sequence[Tensor]) -> None:
        """Raise IdentityError for features of other sizes than the encoder reads."""
        width = self.encoder.config["width"]
        level_width = self.encoder.config["vit_dim"]
        level_widths = [level.shape[-1] for level in hidden]
        if id_cond.shape[-1] != width or level_widths != [level_width] * NUM_LEVELS:
            raise IdentityError(
                f"this adapter reads embeddings of width {width} and {NUM_LEVELS} levels of width "
                f"{level_width}; this identity has {id_cond.shape[-1]} and "
                f"{', '.join(map(str, level_widths)) or 'none'}; "
                "create it again with this adapter's preset."
            )
        num_images = id_cond.shape[1] if id_cond.ndim == 3 else 1
        if any(level.shape[1] < 2 * num_images for level in hidden):
            raise IdentityError(
                "this adapter reads a class token and patches of each image, and this identity "
                "has no patches; create it again with this adapter's preset."
            )

    def unconditional(self, id_cond: Tensor, hidden: Sequence[Tensor], mix: bool = False) -> Tensor:
        """Encode zeros of these shapes: the tokens of the negative half of guidance.

        Returns:
            (1, T, width).
        """
        reference = next(self.encoder.parameters())
        options = {"mix": True} if mix else {}
        levels = [level.to(reference) for level in hidden]
        tokens: Tensor = self.encoder.unconditional(id_cond.to(reference), levels, **options)
        return tokens

    def encode_people(self, prompts: Sequence[Sequence[Person]], mix: bool = False) -> Tensor:
        """Encode every identity once. Prompts with fewer people are padded with zeros.

        Args:
            prompts: per prompt its identities and masks.
            mix: see `encode`.

        Returns:
            (P, J, T, width).

        Raises:
            OptionError: The identities have different numbers of tokens.
            IdentityError: The features of an identity are not finite.
        """
        return encode_people(
            prompts, lambda identity: self.encode(identity.id_cond, identity.hidden, mix)
        )
