"""Build stage of the synthetic world: the images that all models train on."""

from __future__ import annotations

from openpulid.mini.train.build_context import BuildContext, make_progress_printer
from openpulid.mini.train.pulid import PORTRAITS
from openpulid.world.dataset import build_dataset


def render_world(context: BuildContext) -> dict[str, float]:
    """Render the datasets of training images, held-out people and portraits."""
    context.runs.mkdir(parents=True, exist_ok=True)
    plans = {
        "world": context.plan,
        "world-held-out": context.held_out_plan,
        PORTRAITS: context.portrait_plan,
    }
    num_images = {}
    for name, plan in plans.items():
        dataset = build_dataset(
            context.runs / name,
            plan,
            device=str(context.device),
            on_progress=make_progress_printer(name),
        )
        num_images[name] = len(dataset)
    return {
        "pictures": num_images["world"],
        "held_out": num_images["world-held-out"],
        "portraits": num_images[PORTRAITS],
    }
