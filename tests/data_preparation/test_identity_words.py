"""Words of a caption that describe who a person is."""

from __future__ import annotations

import pytest

from openpulid.data.identity_words import remove_identity_words


@pytest.mark.parametrize(
    ("caption", "expected", "words"),
    [
        (
            "an old man with a beard and blue eyes in a park",
            "a man with a beard in a park",
            ["blue eyes", "old"],
        ),
        (
            "a 30-year-old asian woman in a red dress",
            "a woman in a red dress",
            ["30-year-old", "asian"],
        ),
        ("Anna Schmidt smiles at the camera", "a person smiles at the camera", ["Anna Schmidt"]),
        (
            "portrait of Barack Obama in New York",
            "portrait of a person in New York",
            ["Barack Obama"],
        ),
        (
            "a young, beautiful woman with freckles and a hat",
            "a woman with a hat",
            ["freckles", "young", "beautiful"],
        ),
        (
            "a woman named Lisa with green eyes, film noir",
            "a woman, film noir",
            ["named Lisa", "green eyes"],
        ),
        (
            "a man in his thirties holding a guitar",
            "a man holding a guitar",
            ["in his thirties"],
        ),
        ("Dr. House looks up", "a person looks up", ["Dr. House"]),
        ("a woman's freckles in the sun", "a woman in the sun", ["freckles"]),
        ("a freckled young woman, smiling", "a woman, smiling", ["young", "freckled"]),
        (
            "A young actor waits an hour at a university",
            "An actor waits an hour at a university",
            ["young"],
        ),
        (
            "Portrait Of A Young Woman With Freckles In A Red Dress",
            "Portrait Of A Woman In A Red Dress",
            ["Freckles", "Young"],
        ),
        (
            "an elderly lady with wrinkles on her face, smiling",
            "a lady, smiling",
            ["wrinkles on her face", "elderly"],
        ),
    ],
)
def test_identity_words_are_removed(caption: str, expected: str, words: list[str]) -> None:
    assert remove_identity_words(caption) == (expected, words)


@pytest.mark.parametrize(
    "caption",
    [
        "a woman with long blonde hair and glasses",
        "a woman wrinkles her nose at the camera",
        "a man with a big nose ring",
        "a boy with a long face mask",
        "a girl with small ears of corn",
        "a person wearing a black face mask",
        "a woman holding a white baby blanket",
        "a man with a beard and closed eyes",
        "a white dog next to a black car",
        "the old town with a woman",
        "white striped background, a person",
        "a man near the Eiffel Tower in Paris",
        "a smiling person, film noir",
        "Happy Family Having Dinner Together",
        "Businessman Talking On The Phone",
        "Close Up Shot Of A Smiling Man",
    ],
)
def test_caption_without_identity_is_unchanged(caption: str) -> None:
    assert remove_identity_words(caption) == (caption, [])
