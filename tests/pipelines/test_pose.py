"""`pose_from_prompt`: the preset's start and scale, unless the user sets them."""

from __future__ import annotations

from typing import Any

import pytest

from openpulid.errors import OptionError
from openpulid.io.image_grid import to_pil
from openpulid.pipelines.checks import find_active_steps
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import PRESETS, find_preset, mini
from openpulid.pipelines.request import GenerationRequest, IdentityOptions
from openpulid.pipelines.selection import with_method
from openpulid.world import HELD_OUT_PEOPLE, Person, Scene, render


def resolve(preset: str, **identity: Any) -> GenerationRequest:
    request = GenerationRequest(prompt="portrait", identity=IdentityOptions(**identity))
    return find_preset(preset).resolve(request, is_person_shown=True)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_starts_later_and_not_at_a_higher_scale(name: str) -> None:
    models = find_preset(name).models
    default, posed = resolve(name), resolve(name, pose_from_prompt=True)
    assert posed.identity.scale <= default.identity.scale
    skipped = len(find_active_steps(default, models)) - len(find_active_steps(posed, models))
    assert skipped == {
        "mini": 4,
        "mini-flux": 4,
        "sdxl": 5,
        "flux": 4,
        "flux-krea": 4,
        "chroma": 5,
    }.get(name, 1)


@pytest.mark.parametrize("name", ["mini", "flux"])
def test_values_of_the_user_win(name: str) -> None:
    pose = find_preset(name).pose
    scaled = resolve(name, pose_from_prompt=True, scale=1.5).identity
    assert (scaled.scale, scaled.start) == (1.5, pose.start)
    started = resolve(name, pose_from_prompt=True, start=0.5).identity
    assert (started.scale, started.start) == (pose.scale, 0.5)
    assert resolve(name, pose_from_prompt=False) == resolve(name)


def test_a_start_step_of_the_user_wins() -> None:
    identity = resolve("flux", pose_from_prompt=True, start_step=2).identity
    assert (identity.start, identity.start_step) == (0.0, 2)


def test_other_methods_refuse_it() -> None:
    request = GenerationRequest(prompt="portrait", identity={"pose_from_prompt": True})
    with pytest.raises(OptionError, match="faceid does not support: pose_from_prompt"):
        with_method(mini(), "faceid").resolve(request)


def test_the_resolved_request_regenerates_the_image() -> None:
    studio = load("mini-lightning", device="cpu")
    anna = studio.identify(to_pil(render([Person.from_seed(HELD_OUT_PEOPLE)], [Scene()]).image)[0])
    result = studio.generate("portrait", identity=anna, seed=2, pose_from_prompt=True)
    stored = result.requests[0].identity
    assert (stored.start, stored.scale) == (0.2, 1.0)
    explicit = studio.generate("portrait", identity=anna, seed=2, start=0.2, scale=1.0)
    assert explicit.images[0].tobytes() == result.images[0].tobytes()
    default = studio.generate("portrait", identity=anna, seed=2)
    assert default.images[0].tobytes() != result.images[0].tobytes()
