"""Scenes and prompts: closed vocabulary, visible attributes, disjoint held-out combinations."""

import re

import torch

from openpulid.world import ATTRIBUTES, VOCABULARY, Scene


def sample_scenes(count, **options):
    generator = torch.Generator().manual_seed(3)
    return [Scene.sample(generator, **options) for _ in range(count)], generator


def test_prompts_use_vocabulary_only():
    scenes, generator = sample_scenes(300)
    words = {word for scene in scenes for word in re.findall(r"[a-z]+|,", scene.prompt(generator))}
    assert words <= set(VOCABULARY)
    assert len(VOCABULARY) == 86


def test_prompt_is_seeded_and_varies():
    scene = Scene(hat="beanie", glasses="glasses")
    first = scene.prompt(torch.Generator().manual_seed(1))
    assert first == scene.prompt(torch.Generator().manual_seed(1))
    assert first != scene.prompt(torch.Generator().manual_seed(2))
    full = scene.prompt(torch.Generator().manual_seed(1), keep=1.0)
    assert "red" in full and "beanie" in full and "glasses" in full


def test_attributes_are_visible_ones_only():
    assert "background" not in Scene(style="pencil").attributes()
    assert "hair_color" not in Scene(hair_length="bald").attributes()
    assert "hat_color" not in Scene(hat="none").attributes()
    assert "expression" not in Scene(glasses="sunglasses", expression="wink").attributes()
    assert Scene(hat="beanie").attributes()["hat_color"] == "red"


def test_held_out_combinations_are_disjoint_from_training():
    train, _ = sample_scenes(300)
    held_out, _ = sample_scenes(60, held_out=True)
    pairs = {(scene.background, scene.clothing) for scene in train}
    assert not pairs & {(scene.background, scene.clothing) for scene in held_out}
    combinations = len(ATTRIBUTES["background"]) * len(ATTRIBUTES["clothing"])
    kept_out = sum(
        Scene(background=b, clothing=c).is_held_out
        for b in ATTRIBUTES["background"]
        for c in ATTRIBUTES["clothing"]
    )
    assert kept_out == combinations // 7


def test_fixed_attributes_are_kept():
    scenes, _ = sample_scenes(5, pose="left")
    assert {scene.pose for scene in scenes} == {"left"}
