"""The miniature with an untrained file of FastComposer, whose effect is visible."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from openpulid.io.image_grid import to_pil
from openpulid.methods.fastcomposer.encoders import FastComposerEncoder
from openpulid.pipelines.presets import MINIATURE
from openpulid.world import Person, Scene, render
from tests.support.clip_files import config

TWO_PEOPLE = "portrait of a person with a person, photo"
"""A prompt with two words for people, all of them the miniature's."""


def link_miniature(folder: Path) -> Path:
    """Fill a folder with links to the miniature's weights, and a file of FastComposer.

    Returns:
        The folder, as the name of a preset.
    """
    for source in MINIATURE.iterdir():
        (folder / source.name).symlink_to(source)
    torch.manual_seed(1)
    small = config()
    small.projection_dim = 192  # the width of the miniature's text
    metadata = {"tower": json.dumps(small.to_diff_dict())}
    state = FastComposerEncoder(small).state_dict()
    for name, weight in state.items():  # new weights hardly read the image
        if name.endswith(("patch_embedding.weight", "v_proj.weight", "out_proj.weight")):
            weight *= 20
    state["image_encoder.visual_projection.weight"] *= 100
    state["postfuse_module.mlp1.fc2.weight"] *= 10
    state["postfuse_module.layer_norm.weight"] *= 4
    save_file(state, folder / "fastcomposer.safetensors", metadata)
    return folder


def draw_person(seed: int) -> Image.Image:
    """Draw the portrait of a synthetic person."""
    return to_pil(render([Person.from_seed(seed)], [Scene()]).image)[0]
