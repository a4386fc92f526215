"""Options that add something to the base model: LoRAs, textual inversion, a style image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openpulid.errors import OptionError


def describe_loras(models: Sequence[str], scales: Sequence[float]) -> list[dict[str, Any]]:
    """Return the LoRAs of a request, for validation.

    Args:
        models: files, folders, or names of the hub.
        scales: of all LoRAs, or one of each.

    Raises:
        OptionError: the numbers of LoRAs and scales do not fit.
    """
    if (len(scales) > 1 and len(scales) != len(models)) or (scales and not models):
        raise OptionError(
            f"{len(models)} --lora and {len(scales)} --lora-scale: pass one --lora-scale for all, "
            "or one for each --lora."
        )
    own_scales = list(scales) if len(scales) > 1 else list(scales) * len(models)
    loras: list[dict[str, Any]] = [{"model": model} for model in models]
    for item, scale in zip(loras, own_scales, strict=False):
        item["scale"] = scale
    return loras


def describe_embeddings(files: Sequence[str], tokens: Sequence[str]) -> list[dict[str, Any]]:
    """Return the textual inversions of a request, for validation.

    Args:
        files: of the embeddings.
        tokens: their words; none for the names of the files.

    Raises:
        OptionError: the numbers of files and words do not fit.
    """
    if tokens and len(tokens) != len(files):
        raise OptionError(
            f"{len(files)} --embedding and {len(tokens)} --embedding-token: pass one "
            "--embedding-token for each --embedding, or none."
        )
    if not tokens:
        return [{"file": file} for file in files]
    return [{"file": file, "token": token} for file, token in zip(files, tokens, strict=True)]


def describe_style(
    image: str | None, scale: float | None, model: str | None
) -> dict[str, Any] | None:
    """Return the style image of a request, for validation; None if no option names one."""
    options = {"image": image, "scale": scale, "model": model}
    present = {name: value for name, value in options.items() if value is not None}
    return present or None
