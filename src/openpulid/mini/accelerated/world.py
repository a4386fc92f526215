"""Render the training images onto the device, and keep them there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Generator, Tensor

from openpulid.mini.accelerated.scenes import Scenes, draw_people, draw_scenes, stage_of
from openpulid.world.dataset import PORTRAIT_SCENE
from openpulid.world.render import render_stage

FACE = 1
"""Label of the face in `Rendering.parts`."""


@dataclass(frozen=True)
class World:
    """N rendered images; image i shows person i // scenes.

    images (N, 3, S, S) uint8; faces (N, S, S) bool, the face's own pixels; landmarks (N, 5, 2) pixels;
    people (N, P) identity values; scenes: N scenes.
    """

    images: Tensor
    faces: Tensor
    landmarks: Tensor
    people: Tensor
    scenes: Scenes
    per_person: int

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (B, 3, S, S) and face masks (B, 1, S, S) as floats in [0, 1], and landmarks (B, 5, 2)."""
        return (
            self.images[rows].float() / 255,
            self.faces[rows][:, None].float(),
            self.landmarks[rows],
        )

    def first(self, count: int) -> World:
        """Return the first `count` images."""
        cut = {item.name: getattr(self, item.name) for item in fields(self)}
        rows = slice(0, count)
        return World(**{name: x[rows] if name != "per_person" else x for name, x in cut.items()})


def plan_world(
    people: int, scenes: int, portraits: int, generator: Generator, held_out: bool = False
) -> tuple[Tensor, Scenes]:
    """StepRNG who is rendered in which scenes: identity values (N, P) and N scenes, person by person.

    Args:
        scenes, portraits: per person, any scenes, and scenes in studio light with nothing on the head.
    """
    values = draw_people(people, generator)
    each = scenes + portraits
    any_scene = draw_scenes(people * each, generator, held_out)
    plain = draw_scenes(people * each, generator, held_out, PORTRAIT_SCENE)
    is_portrait = torch.arange(people * each, device=values.device) % each >= scenes
    drawn = Scenes(
        torch.where(is_portrait[:, None], plain.attributes, any_scene.attributes),
        torch.where(is_portrait[:, None], plain.jitter, any_scene.jitter),
    )
    return values.repeat_interleave(each, 0), drawn


def render_world(
    people: Tensor,
    scenes: Scenes,
    per_person: int,
    *,
    size: int = 96,
    batch: int = 256,
    seconds: float = float("inf"),
    compiled: bool = False,
    say: Callable[[str], None] = print,
) -> World:
    """Render until everything is drawn or the seconds are over, whole people only.

    Args:
        compiled: compile the renderer once for `batch`; falls back to eager mode where compiling fails.
    """
    count, device = len(people), people.device
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8, device=device)
    faces = torch.zeros(count, size, size, dtype=torch.bool, device=device)
    landmarks = torch.zeros(count, 5, 2, device=device)
    start = time.monotonic()
    done = 0
    while done < count and time.monotonic() - start < seconds:
        rows = torch.arange(done, done + batch, device=device).clamp(
            max=count - 1
        )  # one batch size for the compiler
        try:
            made = render_stage(people[rows], stage_of(scenes[rows]), size, compiled=compiled)
        except Exception as error:
            if not compiled:
                raise
            say(f"the renderer is not compiled: {type(error).__name__}: {str(error)[:300]}")
            compiled = False
            continue
        real = min(batch, count - done)
        images[done : done + real] = (made.image[:real] * 255).round().to(torch.uint8)
        faces[done : done + real] = made.parts[:real] == FACE
        landmarks[done : done + real] = made.landmarks[:real]
        if done == 0:
            _wait(device)
            say(f"first batch rendered after {time.monotonic() - start:.1f} s")
        done += real
        if device.type != "cpu" and done // batch % 16 == 0:
            _wait(device)  # the clock must not run ahead of the device
    _wait(device)
    whole = done // per_person * per_person
    say(f"{whole} images in {time.monotonic() - start:.1f} s")
    return World(images, faces, landmarks, people, scenes, per_person).first(whole)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
