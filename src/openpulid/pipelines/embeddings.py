"""Textual inversion: words whose embeddings are files of a request."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.io.checkpoint_kinds import describe_kind
from openpulid.io.checkpoints import explain_bad_weights, read_tensors
from openpulid.pipelines.model_set import ModelSet
from openpulid.pipelines.request_inputs import Embedding

ENCODERS = {
    "sdxl": {"clip_l": "", "clip_g": "_2"},
    "flux": {"clip_l": "", "t5": "_2"},
}
"""Tensors of an embedding file -> suffix of the text encoder's and the tokenizer's name."""


@dataclass(frozen=True, eq=False)
class EmbeddingInput:
    """The file of an `Embedding`.

    Attributes:
        path: of the file.
        token: the word for it in a prompt.
        tensors: name of the text encoder -> (N, D), the embeddings of N tokens.
    """

    path: Path
    token: str
    tensors: Mapping[str, Tensor]

    def check(self, models: ModelSet) -> None:
        """Check that it has embeddings for the text encoders of the base model.

        Raises:
            WeightsError: it was trained for another base model.
        """
        expected = ENCODERS[models.family]
        if self.tensors.keys() != expected.keys():
            raise WeightsError(
                f"{self.path} is an embedding with {' and '.join(self.tensors)}, and "
                f"{models.base_name} needs {' and '.join(expected)}; use one that was "
                "trained for it."
            )


def open_embedding(embedding: Embedding) -> EmbeddingInput:
    """Read the file of an embedding.

    Raises:
        WeightsError: the file is missing, damaged, or no embedding for SDXL or FLUX.
    """
    path = Path(embedding.file)
    if not path.is_file():
        raise WeightsError(f"{path} does not exist; name the file of an embedding.")
    tensors = read_tensors(path)
    known = {name for encoders in ENCODERS.values() for name in encoders}
    if not tensors or not tensors.keys() <= known:
        reason = describe_kind(tensors)
        if any(name in ("emb_params", "string_to_param.*") for name in tensors):
            reason = "it is one for Stable Diffusion 1 or 2"
        raise WeightsError(f"{path} is no embedding for SDXL or FLUX.1: {reason}.")
    if any(tensor.ndim != 2 for tensor in tensors.values()):
        raise WeightsError(f"{path} is damaged: its tensors are not matrices; download it again.")
    return EmbeddingInput(path, embedding.word, tensors)


@contextmanager
def use_embeddings(pipe: Any, embeddings: Sequence[EmbeddingInput]) -> Iterator[None]:
    """Add words to a pipeline while this is open; afterwards it is as it was.

    Args:
        pipe: a pipeline of SDXL or FLUX.
        embeddings: of the request.

    Raises:
        OptionError: a word is one of the model's vocabulary.
        WeightsError: an embedding does not fit the base model.
    """
    if not embeddings:
        yield
        return
    with _restore(pipe, ""), _restore(pipe, "_2"):
        for embedding in embeddings:
            _load(pipe, embedding)
        yield


def _load(pipe: Any, embedding: EmbeddingInput) -> None:
    family = "sdxl" if getattr(pipe, "unet", None) is not None else "flux"
    for name, suffix in ENCODERS[family].items():
        tokenizer = getattr(pipe, f"tokenizer{suffix}")
        encoder = getattr(pipe, f"text_encoder{suffix}")
        if embedding.token in tokenizer.get_vocab():
            raise OptionError(
                f"{embedding.token!r} is a word of the model or of another embedding; choose "
                f"another word for {embedding.path}."
            )
        width = encoder.get_input_embeddings().weight.shape[1]
        tensor = embedding.tensors[name]
        if tensor.shape[1] != width:
            raise WeightsError(
                f"{embedding.path} does not fit this base model: its {name} has width "
                f"{tensor.shape[1]}, the text encoder {width}; use one that was trained for it."
            )
        with explain_bad_weights(f"{embedding.path} cannot be loaded"):
            pipe.load_textual_inversion(
                tensor.to(encoder.device, encoder.dtype),
                token=embedding.token,
                tokenizer=tokenizer,
                text_encoder=encoder,
            )


@contextmanager
def _restore(pipe: Any, suffix: str) -> Iterator[None]:
    """Restore a tokenizer and its text encoder's embedding matrices, which may be tied.

    diffusers' `unload_textual_inversion` takes the token after the last special one for the first
    that was added, which is wrong for vocabularies in another order.
    """
    tokenizer = getattr(pipe, f"tokenizer{suffix}")
    encoder = getattr(pipe, f"text_encoder{suffix}")
    size = encoder.config.vocab_size
    matrices = [
        (name, module, module.weight, module.weight.data)
        for name, module in encoder.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding)
    ]
    try:
        setattr(pipe, f"tokenizer{suffix}", copy.deepcopy(tokenizer))
        yield
    finally:
        setattr(pipe, f"tokenizer{suffix}", tokenizer)
        encoder.config.vocab_size = size
        for name, module, weight, data in matrices:
            encoder.set_submodule(name, module)
            module.weight = weight
            module.weight.data = data
            module.num_embeddings = len(data)
