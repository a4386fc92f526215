"""Whether the miniature works: a portrait, its identity, and an image of that person."""

from __future__ import annotations

import time

from openpulid.device import best_device
from openpulid.doctor.report import Section
from openpulid.pipelines.loading import load
from openpulid.world.gallery import render_portrait

PERSON = 1_000_007
"""A synthetic person that is not in the training data."""
SIDE = 96
"""Pixels of the miniature's images."""
NUM_STEPS = 2


def check() -> Section:
    """Generate an image with the miniature on the best device."""
    device = best_device()
    start = time.perf_counter()
    studio = load("mini", device)
    identity = studio.identify(render_portrait(PERSON, SIDE))
    studio.generate("portrait", identity, num_inference_steps=NUM_STEPS)
    seconds = time.perf_counter() - start
    columns = ("miniature", "device", "seconds")
    return Section(columns, (("works", str(device), f"{seconds:.1f}"),))
