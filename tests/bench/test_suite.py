"""Suites are data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openpulid.bench.suite import find_suite
from openpulid.errors import OptionError
from openpulid.world import ATTRIBUTES, VOCABULARY


def test_the_papers_suite_is_the_papers() -> None:
    suite = find_suite("pulid-paper")
    assert len(suite.prompts) == 21 and suite.likeness == [20] and len(suite.seeds) == 4
    assert (
        suite.prompts[20].text == "portrait, color, cinematic, in garden, soft light, detailed face"
    )
    assert next(iter(suite.published.values()))["pulid"] == {
        "face_sim": 0.659,
        "clip_t": 32.16,
        "clip_i": 0.84,
    }
    said = suite.published["the authors' discussion"]
    speeds = {"photomaker": 8.69, "faceid": 6.08, "instantid": 4.66, "pulid": 5.85}
    assert {method: values["steps_per_second"] for method, values in said.items()} == speeds


@pytest.mark.parametrize("name", ["miniature", "quick"])
def test_the_miniatures_prompts_are_words_it_knows(name: str) -> None:
    for prompt in find_suite(name).prompts:
        assert set(prompt.text.replace(",", " , ").split()) <= set(VOCABULARY)
        assert all(value in ATTRIBUTES[attribute] for attribute, value in prompt.wanted.items())


def test_a_file_is_a_suite_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    facts = {
        "about": "Mine.",
        "preset": "mini",
        "people": 2,
        "seeds": [1],
        "prompts": [{"text": "portrait"}],
    }
    file.write_text(json.dumps(facts))
    assert find_suite(str(file)).name == "mine"
    wrong = (
        {"seeds": []},
        {"likeness": [1]},
        {"persons": 2},
        {"options": {"batch": 2}},
        {"prompts": None},
    )
    for broken in [{**facts, **change} for change in wrong]:
        file.write_text(json.dumps(broken))
        with pytest.raises(OptionError, match="suite"):
            find_suite(str(file))
    with pytest.raises(OptionError, match="miniature, pulid-paper, quick"):
        find_suite("everything")
