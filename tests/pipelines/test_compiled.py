"""`compiled`: the same images but for rounding, and stored with them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from openpulid import load
from openpulid.errors import Stopped
from openpulid.identity.identity import Identity
from openpulid.io.image_grid import to_pil
from openpulid.pipelines.studio import Studio
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render


@pytest.fixture(scope="module")
def studio() -> Studio:
    return load("mini-lightning", device="cpu")


@pytest.fixture(scope="module")
def anna(studio: Studio) -> Identity:
    image = render([Person.from_seed(HELD_OUT_PEOPLE)], [Scene()]).image
    return studio.identify(to_pil(image)[0])


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """Forget what other tests have compiled, and what these have."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def count_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs g++ to compile for a CPU")
def test_compiled_images_are_those_without(studio: Studio, anna: Identity) -> None:
    results = {
        compiled: studio.generate("portrait, smiling", anna, seed=3, compiled=compiled)
        for compiled in (False, True)
    }
    assert count_graphs() > 0
    eager, compiled = (np.asarray(result.images[0]).astype(int) for result in results.values())
    assert np.abs(eager - compiled).max() <= 2
    for choice, result in results.items():
        assert result.requests[0].identity.compiled == choice


def test_nothing_is_compiled_on_a_cpu_by_default(studio: Studio, anna: Identity) -> None:
    request = studio.generate("portrait", anna, num_images=17, callback=stop_after_one).requests[0]
    assert request.identity.compiled is None and count_graphs() == 0
    assert studio.preset.resolve(request) == request


def stop_after_one(step: int, total: int, preview: object) -> None:
    if step == total // 17 + 1:
        raise Stopped
