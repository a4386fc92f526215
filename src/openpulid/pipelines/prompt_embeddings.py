"""Embeddings of prompts with weights, and of prompts that are longer than what CLIP reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from openpulid.io.loggers import silence_warnings
from openpulid.pipelines.presets import NEGATIVE_PROMPT, Preset
from openpulid.pipelines.prompt_weights import Fragment, parse_weights, remove_marks
from openpulid.pipelines.prompts import check_words_for_people, prepare_prompts
from openpulid.pipelines.request import GenerationRequest

PromptOptions = Mapping[str, str | Tensor | None]
"""Arguments of a pipeline for one image: prompts, or their embeddings."""


def encode_prompts(
    pipe: Any,
    request: GenerationRequest,
    preset: Preset,
    insert_trigger: Callable[[str], str] = str,
    num_people: int = 0,
) -> PromptOptions:
    """Return the prompts of a request as a pipeline takes them.

    Prompts without weights that CLIP reads as a whole stay text, so that the pipeline does what it
    does without this package. Otherwise compel encodes them: a weight scales the difference to the
    empty prompt, and chunks of a long prompt are encoded one by one and joined.

    Args:
        pipe: a pipeline of SDXL or FLUX.
        request: a resolved request.
        preset: the preset that runs it.
        insert_trigger: names the person in the prompt, see `Adapter.insert_trigger`.
        num_people: how many people the image shows.

    Raises:
        PromptError: the model does not know a word.
        RequestError: the prompt has fewer words for people than a method like FastComposer needs.
    """
    request = prepare_prompts(pipe, request, preset)
    prompt, negative = insert_trigger(request.prompt), request.negative_prompt
    if preset.models.shows_people_by_words:
        text = pipe.maybe_convert_prompt(remove_marks(prompt), pipe.tokenizer_2)
        check_words_for_people(pipe.tokenizer_2, text, num_people)
    # the negative prompt of PuLID's program is cut there; whether it is cut depends on the request
    # alone, because images are generated again with other defaults
    is_cut = negative == NEGATIVE_PROMPT
    texts = [prompt] if negative is None or is_cut else [prompt, negative]
    if not preset.reads_weights or not any(_needs_embeddings(pipe, text) for text in texts):
        plain = {"prompt": remove_marks(prompt)}
        if "negative_prompt" not in preset.options:  # its pipeline has no such argument
            return plain
        return {**plain, "negative_prompt": None if negative is None else remove_marks(negative)}
    embeds, pooled = _encode(pipe, parse_weights(prompt))
    if negative is None and pipe.config.force_zeros_for_empty_prompt:
        negative_embeds, negative_pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
    else:
        fragments = parse_weights(negative or "")
        negative_embeds, negative_pooled = _encode(pipe, fragments, is_cut)
    length = max(embeds.shape[1], negative_embeds.shape[1])
    return {
        "prompt_embeds": _pad(pipe, embeds, length),
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": _pad(pipe, negative_embeds, length),
        "negative_pooled_prompt_embeds": negative_pooled,
    }


def join_prompts(options: Sequence[PromptOptions]) -> dict[str, Any]:
    """Return arguments for several images from those for one image each.

    Args:
        options: per image the arguments, such as those of `encode_prompts`; all with one
            `prompt_layout`.
    """
    joined: dict[str, Any] = {}
    for name, first in options[0].items():
        values: list[Any] = [option[name] for option in options]
        if isinstance(first, Tensor):
            tensor = torch.cat(values)
            # pipelines take one entry for each IP-Adapter
            joined[name] = [tensor] if "ip_adapter" in name else tensor
        else:
            # "" is encoded; None is what the pipeline uses without a negative prompt
            joined[name] = None if first is None else values
    return joined


def prompt_layout(options: PromptOptions) -> tuple[object, ...]:
    """Return what the arguments of all images of one call must have in common."""
    return tuple(
        (name, value.shape if isinstance(value, Tensor) else type(value))
        for name, value in options.items()
    )


def _needs_embeddings(pipe: Any, text: str) -> bool:
    """Whether a prompt has weights, or more tokens than CLIP reads."""
    fragments = parse_weights(text)
    if any(fragment.weight != 1 for fragment in fragments):
        return True
    tokenizer = pipe.tokenizer
    plain = pipe.maybe_convert_prompt(fragments[0].text, tokenizer)
    ids = tokenizer(plain, truncation=False, verbose=False).input_ids
    return len(ids) > int(tokenizer.model_max_length)


@torch.no_grad()
def _encode(
    pipe: Any, fragments: Sequence[Fragment], is_cut: bool = False
) -> tuple[Tensor, Tensor]:
    """Encode a prompt with both text encoders.

    Args:
        pipe: a pipeline of SDXL.
        fragments: parts of the prompt and their weights.
        is_cut: read the first chunk alone.

    Returns:
        (1, T, D), where T is a multiple of the tokens that CLIP reads, and the pooled embedding
        (1, E) of the first chunk, which has no weights.
    """
    # imported here, because it imports pipelines of other models
    from compel.embeddings_provider import (
        EmbeddingsProvider,
        ReturnedEmbeddingsType,
        SplitLongTextMode,
    )

    layer = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED  # as in SDXL
    device = pipe._execution_device
    embeds = []
    for suffix in ("", "_2"):
        tokenizer = getattr(pipe, f"tokenizer{suffix}")
        provider = EmbeddingsProvider(
            tokenizer,
            getattr(pipe, f"text_encoder{suffix}"),
            truncate=is_cut,
            returned_embeddings_type=layer,
            split_long_text_mode=SplitLongTextMode.PHRASES,
            device=device,
        )
        texts = [pipe.maybe_convert_prompt(fragment.text, tokenizer) for fragment in fragments]
        weights = [fragment.weight for fragment in fragments]
        # that a prompt has more tokens than CLIP reads
        with silence_warnings("transformers.tokenization_utils_base"):
            embeds.append(
                provider.get_embeddings_for_weighted_prompt_fragments(
                    [texts], [weights], device=device
                )
            )
    pooled = provider.get_pooled_embeddings(["".join(texts)], device=device)
    return torch.cat(embeds, dim=-1), pooled


def _pad(pipe: Any, embeds: Tensor, length: int) -> Tensor:
    """Append chunks of the empty prompt up to a number of tokens."""
    chunks = [embeds]
    while sum(chunk.shape[1] for chunk in chunks) < length:
        chunks.append(_encode(pipe, [Fragment("")])[0])
    return torch.cat(chunks, dim=1)
