"""Prompts of held-out people and scenes, and renderings of what they describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openpulid.world import ATTRIBUTES, HELD_OUT_PEOPLE, Person, Scene, render


@dataclass(frozen=True)
class EvalPrompt:
    """One image that every model generates.

    Attributes:
        person: index of the person.
        prompt: the prompt.
        seed: the seed of the initial noise.
        scene: the scene that the prompt describes.
    """

    person: int
    prompt: str
    seed: int
    scene: Scene

    @property
    def wanted(self) -> dict[str, int]:
        """Attribute -> index of the class that should be visible."""
        return {
            name: ATTRIBUTES[name].index(value) for name, value in self.scene.attributes().items()
        }


def sample_prompts(people: int, prompts: int, people_seed: int = 0) -> list[EvalPrompt]:
    """Sample prompts of held-out scenes; each mentions all visible attributes.

    Prompt and seed only depend on the person and the index of the image, so they are the same for
    every model and machine.

    Args:
        people: number of people.
        prompts: prompts per person.
        people_seed: the first person, from `HELD_OUT_PEOPLE`.
    """
    eval_prompts = []
    for person in range(people):
        generator = torch.Generator().manual_seed(HELD_OUT_PEOPLE + people_seed + person)
        for _ in range(prompts):
            scene = Scene.sample(generator, held_out=True)
            seed = int(torch.randint(2**31, (), generator=generator))
            prompt = scene.prompt(generator, keep=1.0)
            # the first numbers of this generator are the values of the person's face
            scene = scene.with_jitter(torch.Generator().manual_seed(seed))
            eval_prompts.append(EvalPrompt(person, prompt, seed, scene))
    return eval_prompts


def render_portraits(people: int, people_seed: int = 0) -> Tensor:
    """Render the reference images, neutral portraits (people, 3, 96, 96)."""
    return torch.cat([_render(k, Scene(), people_seed) for k in range(people)])


def render_ground_truth(
    prompts: Sequence[EvalPrompt], people: int, people_seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Render what a perfect method would generate with and without identity.

    Args:
        prompts: B prompts.
        people: number of people.
        people_seed: the first person, from `HELD_OUT_PEOPLE`.

    Returns:
        The scene of each prompt with its person, and with another person; (B, 3, 96, 96) each.
    """
    others = [(p.person + people // 2) % people if people > 1 else 1 for p in prompts]
    with_identity = [_render(p.person, p.scene, people_seed) for p in prompts]
    without = [
        _render(other, p.scene, people_seed) for other, p in zip(others, prompts, strict=True)
    ]
    return torch.cat(with_identity), torch.cat(without)


def _render(person: int, scene: Scene, people_seed: int) -> Tensor:
    return render([Person.from_seed(HELD_OUT_PEOPLE + people_seed + person)], [scene]).image
