"""Both ways in which PhotoVerse acts on a pipeline: words of the prompt, and visual attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor

from openpulid.errors import WeightsError
from openpulid.methods.adapter import check_text_encoders, exclusive_use
from openpulid.methods.hooks import PipelineState, Span, find_unet
from openpulid.methods.photoverse.attention import Fusion, open_attention
from openpulid.methods.photoverse.encoders import PhotoVerseNetworks
from openpulid.methods.second_attention import check_layers
from openpulid.methods.word_fusion import WordFusion, embedding_widths

__all__ = ["Fusion", "check_pipeline", "open_person"]

ORIGIN = "use a file that was trained on this base model"


def check_pipeline(target: Any, networks: PhotoVerseNetworks) -> None:
    """Raise an error if networks do not fit a pipeline of SDXL.

    Raises:
        OptionError: the target is no pipeline of SDXL.
        WeightsError: the networks were trained for another base model.
    """
    unet = find_unet(target)
    check_text_encoders(target)
    shapes = {
        key: tuple(layer.get_parameter("to_k_visual.weight").shape)
        for key, layer in networks.cross_attention.items()
    }
    check_layers(shapes, unet, ORIGIN)
    width = networks.text_adapter.width
    if width != sum(embedding_widths(target)):
        raise WeightsError(
            f"this adapter has words of width {width}, and the text encoders of this pipeline read "
            f"{sum(embedding_widths(target))}; {ORIGIN}."
        )


class InsertedWords(WordFusion):
    """PhotoVerse's words on one pipeline."""

    method: ClassVar[str] = "PhotoVerse"


@contextmanager
def open_person(
    networks: PhotoVerseNetworks,
    words: Sequence[Tensor],
    tokens: Tensor,
    fusion: Fusion,
    slot: str,
    state: PipelineState,
    span: Span,
) -> Iterator[None]:
    """Register the hooks on one pipeline while the context is open.

    Args:
        networks: of a file.
        words: (m, word width) per identity.
        tokens: (P, 5, C), visual tokens.
        fusion: weights of the parts of a layer.
        slot: see `Adapter.slot`.
        state: of the pipeline.
        span: of the schedule in which both act.

    Raises:
        OptionError: another method that changes the prompt is in use, or the U-Net is compiled.
    """
    insertion = InsertedWords(state, words, span)
    with (
        exclusive_use(state.network, slot),
        insertion.register(),
        open_attention(networks, tokens, fusion, state, span),
    ):
        yield
