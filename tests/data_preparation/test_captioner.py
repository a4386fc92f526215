"""Captions by a tiny vision-language model with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openpulid.data.captioner import DEFAULT_PROMPT, DEFAULT_QUESTION, Captioner
from openpulid.errors import WeightsError
from tests.support.tiny_captioner import WORDS, save_tiny_captioner

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_captioner(tmp_path_factory.mktemp("blip"))


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 255, (40 + 8 * k, 56, 3), np.uint8)) for k in range(count)
    ]


def record_calls(captioner: Captioner, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Collect the arguments of each call of the model."""
    calls: list[dict[str, Any]] = []
    model_call = type(captioner.model).__call__

    def record(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return model_call(self, *arguments, **options)

    monkeypatch.setattr(type(captioner.model), "__call__", record)
    return calls


@pytest.mark.usefixtures("both_precisions")
def test_captions_are_repeatable_and_without_the_prompt(model) -> None:
    captioner = Captioner.load(str(model), "cpu")
    assert captioner.prompt == DEFAULT_PROMPT and not captioner.is_chat
    captions = captioner.caption(images(3))
    assert len(captions) == 3 and all(captions)
    assert {word for caption in captions for word in caption.split()} <= set(WORDS)
    assert not any(caption.startswith(DEFAULT_PROMPT) for caption in captions)
    assert captioner.caption(images(3)) == captions


def test_own_prompt_is_continued(model, monkeypatch) -> None:
    captioner = Captioner.load(str(model), "cpu", "a woman with")
    calls = record_calls(captioner, monkeypatch)
    assert captioner.caption(images(2)) and calls[0]["text"] == ["a woman with"] * 2


def test_chat_model_is_asked(model, monkeypatch) -> None:
    """A chat model gets the image and the question as a message; BLIP-2 adds its image tokens."""
    captioner = Captioner.load(str(model), "cpu")
    processor = captioner.model.processor
    processor.chat_template = CHAT_TEMPLATE
    chat = Captioner(captioner.model)
    assert chat.is_chat and chat.prompt == DEFAULT_QUESTION
    calls = record_calls(chat, monkeypatch)
    captions = chat.caption(images(2))
    assert len(captions) == 2 and all(isinstance(caption, str) for caption in captions)
    (content,) = [message["content"] for message in calls[0]["text"][0]]
    assert [part["type"] for part in content] == ["image", "text"]
    assert content[1]["text"] == DEFAULT_QUESTION


def test_folder_without_a_model_is_one_sentence(tmp_path) -> None:
    with pytest.raises(WeightsError, match="cannot be used as a captioner"):
        Captioner.load(str(tmp_path), "cpu")
    with pytest.raises(WeightsError, match="`pulid weights get"):
        Captioner.load("owner/model", "cpu")


def test_failure_without_a_message_is_named_by_its_class(tmp_path, monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ValueError

    monkeypatch.setattr("transformers.pipeline", fail)
    with pytest.raises(WeightsError, match=r"as a captioner \(ValueError\); name"):
        Captioner.load(str(tmp_path), "cpu")
