"""Captions of images by a vision-language model of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from openpulid.device import training_dtype
from openpulid.errors import WeightsError, first_line
from openpulid.io.loggers import silence_warnings
from openpulid.pipelines.weights import resolve_path

DEFAULT_PROMPT = "a photo of"
DEFAULT_QUESTION = (
    "Describe this photograph in one sentence: clothes, pose, expression, action, place, light and "
    "style. Do not describe the age, the origin or the features of the face."
)
MAX_TOKENS = 77
"""Longest caption in tokens, as SDXL reads it."""


class Captioner:
    """A vision-language model such as BLIP-2 (arXiv 2301.12597).

    Args:
        model: transformers' pipeline "image-text-to-text".
        prompt: see `load`.
    """

    def __init__(self, model: Any, prompt: str = "") -> None:
        self.model = model
        self.is_chat = getattr(model.processor, "chat_template", None) is not None
        self.prompt = prompt or (DEFAULT_QUESTION if self.is_chat else DEFAULT_PROMPT)

    @classmethod
    def load(cls, name: str, device: str | torch.device, prompt: str = "") -> Captioner:
        """Load a model from local files.

        Args:
            name: a folder, a name of the registry, or OWNER/NAME in the hub's cache.
            device: where to compute.
            prompt: the text that the model continues, or the question that a chat model answers.

        Raises:
            WeightsError: it is not installed, or is no such model.
        """
        from transformers import pipeline

        folder = find_captioner(name)
        device = torch.device(device)
        try:
            with silence_warnings("transformers"):
                model = pipeline(
                    "image-text-to-text",
                    model=str(folder),
                    device=device,
                    dtype=training_dtype(device),
                )
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = first_line(error)
            raise WeightsError(
                f"{name} cannot be used as a captioner ({reason}); name a vision-language model "
                "of transformers, such as blip2."
            ) from None
        return cls(model, prompt)

    def caption(self, images: Sequence[Image.Image]) -> list[str]:
        """Caption images, each as one line, always with the same result.

        Args:
            images: at least one.
        """
        options = {
            "return_full_text": False,
            "max_new_tokens": MAX_TOKENS,
            "batch_size": len(images),
            "generate_kwargs": {"do_sample": False},
        }
        if self.is_chat:
            outputs = self.model(text=[self._ask(image) for image in images], **options)
        else:
            outputs = self.model(images=list(images), text=[self.prompt] * len(images), **options)
        texts = [output[0] if isinstance(output, list) else output for output in outputs]
        return [" ".join(text["generated_text"].split()) for text in texts]

    def _ask(self, image: Image.Image) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": image}, {"type": "text", "text": self.prompt}]
        return [{"role": "user", "content": content}]


def find_captioner(name: str) -> Path:
    """Return the folder of a vision-language model.

    Raises:
        WeightsError: it is not installed; the message says how to get it.
    """
    return resolve_path(name)
