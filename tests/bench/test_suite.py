"""Tests of benchmark suites."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from openpulid.bench.suite import load_suite
from openpulid.errors import OptionError
from openpulid.pipelines.request import GenerationOptions
from openpulid.world import ATTRIBUTES, VOCABULARY

GUIDE = Path(__file__).parents[2] / "docs/benchmark.md"


def test_example_and_options_of_the_guide_are_accepted(tmp_path: Path) -> None:
    text = GUIDE.read_text()
    example = re.search(r'^ {4}(\{"about".*?\}\]\})$', text, re.MULTILINE | re.DOTALL)
    assert example is not None
    path = tmp_path / "mine.json"
    path.write_text(example[1])
    assert load_suite(str(path)).options == {"num_inference_steps": 20}
    row = re.search(r"^\| `options` \| (.*) \|$", text, re.MULTILINE)
    assert row is not None
    names = re.findall(r"`(\w+)`", row[1])
    values = {"width": 64, "height": 64, "negative_prompt": "red", "true_cfg_scale": 1}
    options = {name: values.get(name, 1) for name in names}
    GenerationOptions.from_options(**options)
    assert {"guidance_scale", "start", "timestep_to_start_cfg"} <= set(names)


def test_paper_suite_has_published_prompts_and_values() -> None:
    suite = load_suite("pulid-paper")
    assert len(suite.prompts) == 21 and suite.identity_prompts == [20] and len(suite.seeds) == 4
    assert (
        suite.prompts[20].text == "portrait, color, cinematic, in garden, soft light, detailed face"
    )
    assert next(iter(suite.published.values()))["pulid"] == {
        "face_sim": 0.659,
        "clip_t": 32.16,
        "clip_i": 0.84,
    }
    discussion = suite.published["the authors' discussion"]
    speeds = {"photomaker": 8.69, "faceid": 6.08, "instantid": 4.66, "pulid": 5.85}
    assert {name: values["steps_per_second"] for name, values in discussion.items()} == speeds


@pytest.mark.parametrize("name", ["miniature", "quick"])
def test_miniature_suites_use_known_vocabulary_and_attributes(name: str) -> None:
    for prompt in load_suite(name).prompts:
        assert set(prompt.text.replace(",", " , ").split()) <= set(VOCABULARY)
        assert all(value in ATTRIBUTES[attribute] for attribute, value in prompt.attributes.items())


def test_suite_is_loaded_from_json_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    data = {
        "about": "Mine.",
        "preset": "mini",
        "num_people": 2,
        "seeds": [1],
        "prompts": [{"text": "portrait"}],
    }
    path.write_text(json.dumps(data))
    assert load_suite(str(path)).name == "mine"


@pytest.mark.parametrize(
    "change",
    [
        {"seeds": []},
        {"seeds": [2**64]},
        {"seeds": [-1]},
        {"seeds": [1.5]},
        {"seeds": 3},
        {"identity_prompts": [1]},
        {"persons": 2},
        {"options": {"batch": 2}},
        {"prompts": None},
        {"num_people": 10**7},
        {"seeds": list(range(1001))},
        {"prompts": [{"text": "portrait"}] * 10_001},
        {"prompts": [{"text": "a" * 10_001}]},
        {"options": {"num_inference_steps": 10**7}},
        {"options": {"width": 10**6}},
        {"options": {"scale": float("nan")}},
    ],
)
def test_invalid_suite_is_rejected(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "mine.json"
    data = {"about": "Mine.", "preset": "mini", "seeds": [1], "prompts": [{"text": "portrait"}]}
    path.write_text(json.dumps({**data, **change}))
    with pytest.raises(OptionError, match="suite"):
        load_suite(str(path))


def test_unknown_suite_error_lists_suites() -> None:
    with pytest.raises(OptionError, match="miniature, multiid-bench, pulid-paper, quick"):
        load_suite("everything")


def test_suite_survives_json_round_trip() -> None:
    suite = load_suite("quick")
    assert type(suite).from_json(suite.to_json()).to_json() == suite.to_json()


def test_identity_prompts_split_the_metrics() -> None:
    paper = load_suite("pulid-paper")
    assert paper.is_scored(20, identity=True) and not paper.is_scored(20, identity=False)
    assert paper.is_scored(0, identity=False) and not paper.is_scored(0, identity=True)
    quick = load_suite("quick")
    assert quick.is_scored(0, identity=True) and quick.is_scored(0, identity=False)
