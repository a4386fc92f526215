"""Training images that are rendered on the device and stay there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from openpulid.device import synchronize
from openpulid.mini.accelerated.scenes import Scenes, draw_people, draw_scenes
from openpulid.mini.data.loading import FACE
from openpulid.world.dataset import PORTRAIT_SCENE
from openpulid.world.render import render_stage


@dataclass(frozen=True)
class World:
    """N rendered images; image i shows person i // per_person.

    Attributes:
        images: (N, 3, S, S) uint8.
        faces: (N, S, S) bool, the pixels of the face.
        landmarks: (N, 5, 2) in pixels.
        people: (N, P) identity values.
        scenes: N scenes.
        per_person: images per person.
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
        """Return images and face masks as floats in [0, 1], and landmarks in pixels.

        Args:
            rows: (B,) row numbers.

        Returns:
            (B, 3, S, S), (B, 1, S, S) and (B, 5, 2).
        """
        images = self.images[rows].float() / 255
        return images, self.faces[rows][:, None].float(), self.landmarks[rows]

    def first(self, count: int) -> World:
        """Return the first `count` images."""
        return World(
            self.images[:count],
            self.faces[:count],
            self.landmarks[:count],
            self.people[:count],
            self.scenes[slice(0, count)],
            self.per_person,
        )


def plan_world(
    people: int, scenes: int, portraits: int, generator: Generator, held_out: bool = False
) -> tuple[Tensor, Scenes]:
    """Sample people and their scenes, person by person.

    Args:
        people: number of people.
        scenes: number of arbitrary scenes per person.
        portraits: number of scenes per person in studio light with nothing on the head.
        generator: on the device of the result.
        held_out: use the color combinations that are not in the training data.

    Returns:
        Identity values (N, P) and N scenes.
    """
    values = draw_people(people, generator)
    per_person = scenes + portraits
    count = people * per_person
    any_scenes = draw_scenes(count, generator, held_out)
    portrait_scenes = draw_scenes(count, generator, held_out, PORTRAIT_SCENE)
    is_portrait = (torch.arange(count, device=values.device) % per_person >= scenes)[:, None]
    drawn = Scenes(
        torch.where(is_portrait, portrait_scenes.attributes, any_scenes.attributes),
        torch.where(is_portrait, portrait_scenes.jitter, any_scenes.jitter),
    )
    return values.repeat_interleave(per_person, 0), drawn


def render_world(
    people: Tensor,
    scenes: Scenes,
    per_person: int,
    *,
    size: int = 96,
    batch: int = 256,
    seconds: float = float("inf"),
    compiled: bool = False,
    log: Callable[[str], None] = print,
) -> World:
    """Render all images, or those of as many complete people as the time allows.

    Args:
        people: (N, P) identity values.
        scenes: N scenes.
        per_person: images per person.
        size: width and height of the images.
        batch: images per call of the renderer.
        seconds: time limit.
        compiled: compile the renderer once for `batch`; if that fails it runs in eager mode.
        log: receives messages.
    """
    count = len(people)
    device = people.device
    images = torch.zeros(count, 3, size, size, dtype=torch.uint8, device=device)
    faces = torch.zeros(count, size, size, dtype=torch.bool, device=device)
    landmarks = torch.zeros(count, 5, 2, device=device)
    start = time.monotonic()
    done = 0
    while done < count and time.monotonic() - start < seconds:
        # the last batch repeats its last image: the compiler needs a single batch size
        rows = torch.arange(done, done + batch, device=device).clamp(max=count - 1)
        try:
            rendering = render_stage(people[rows], scenes[rows].tensors(), size, compiled=compiled)
        except Exception as error:
            if not compiled:
                raise
            log(f"the renderer is not compiled: {type(error).__name__}: {str(error)[:300]}")
            compiled = False
            continue
        new = min(batch, count - done)
        images[done : done + new] = (rendering.image[:new] * 255).round().to(torch.uint8)
        faces[done : done + new] = rendering.parts[:new] == FACE
        landmarks[done : done + new] = rendering.landmarks[:new]
        if done == 0:
            synchronize(device)
            log(f"first batch rendered after {time.monotonic() - start:.1f} s")
        done += new
        if done // batch % 16 == 0:
            synchronize(device)  # otherwise the clock is read before the device has finished
    synchronize(device)
    complete = done // per_person * per_person
    log(f"{complete} images in {time.monotonic() - start:.1f} s")
    return World(images, faces, landmarks, people, scenes, per_person).first(complete)
