"""Scenes and their sentences: closed vocabulary, only what can be seen, no identity, held-out combinations apart."""

import re

import torch

from openpulid.world import ATTRIBUTES, VOCABULARY, Scene


def scenes(count, **options):
    generator = torch.Generator().manual_seed(3)
    return [Scene.sample(generator, **options) for _ in range(count)], generator


def test_prompts_use_the_vocabulary_only():
    drawn, generator = scenes(300)
    words = {word for scene in drawn for word in re.findall(r"[a-z]+|,", scene.prompt(generator))}
    assert words <= set(VOCABULARY)
    assert len(VOCABULARY) == 86


def test_a_prompt_is_reproducible_and_varies():
    scene = Scene(hat="beanie", glasses="glasses")
    first = scene.prompt(torch.Generator().manual_seed(1))
    assert first == scene.prompt(torch.Generator().manual_seed(1))
    assert first != scene.prompt(torch.Generator().manual_seed(2))
    full = scene.prompt(torch.Generator().manual_seed(1), keep=1.0)
    assert "red" in full and "beanie" in full and "glasses" in full


def test_attributes_are_what_can_be_seen():
    assert "background" not in Scene(style="pencil").attributes()
    assert "hair_color" not in Scene(hair_length="bald").attributes()
    assert "hat_color" not in Scene(hat="none").attributes()
    assert "expression" not in Scene(glasses="sunglasses", expression="wink").attributes()
    assert Scene(hat="beanie").attributes()["hat_color"] == "red"


def test_held_out_combinations_never_meet_training():
    train, _ = scenes(300)
    held_out, _ = scenes(60, held_out=True)
    pairs = {(scene.background, scene.clothing) for scene in train}
    assert not pairs & {(scene.background, scene.clothing) for scene in held_out}
    combinations = len(ATTRIBUTES["background"]) * len(ATTRIBUTES["clothing"])
    kept_out = sum(
        Scene(background=b, clothing=c).is_held_out
        for b in ATTRIBUTES["background"]
        for c in ATTRIBUTES["clothing"]
    )
    assert kept_out == combinations // 7


def test_fixed_attributes_stay():
    drawn, _ = scenes(5, pose="left")
    assert {scene.pose for scene in drawn} == {"left"}
