"""The studio on a tiny FLUX: the preset's options reach pipeline and adapter, and a seed is an image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from openpulid.errors import OptionError, PromptError
from openpulid.identity.identity import Identity
from openpulid.pipelines.presets import PRESETS, flux, flux_krea, flux_schnell, with_options
from openpulid.pipelines.studio import Studio, load
from tests.support.people import anna
from tests.support.tiny_flux import fresh, tiny_pipe


@pytest.fixture(scope="module")
def studio() -> Studio:
    pipe = tiny_pipe()
    preset = replace(flux(), steps=3, size=(32, 32), half=False, text_tokens=10)
    return Studio(pipe, None, fresh(pipe), preset)


def test_presets() -> None:
    assert (flux().steps, flux().guidance, flux().text_tokens) == (20, 4.0, 128)
    assert flux_krea().pipeline == "flux-krea-base" and flux_schnell().steps == 4
    with pytest.raises(OptionError, match="with flux-schnell nothing would change by guidance"):
        with_options(flux_schnell(), guidance=3.0)
    assert flux().identity_options() == {
        "scale": 1.0,
        "start": 0.0,
        "end": 1.0,
        "start_step": None,
        "timestep_to_start_cfg": 1,
    }
    assert flux().published[0] == "flux-dev" and "pulid-flux-v0.9.1" in flux().published
    assert all(PRESETS[name]().name == name for name in PRESETS)


def test_a_seed_is_an_image(studio) -> None:
    both = studio.generate("portrait of a person", anna, seed=4, num_images=2)
    alone = studio.generate("portrait of a person", anna, seed=5)
    assert both.images[0].size == (32, 32) and both.images[1].tobytes() == alone.images[0].tobytes()
    together = studio.generate("portrait of a person", anna, seed=4, num_images=2, batch=2)
    for one, other in zip(both.images, together.images, strict=True):
        assert np.abs(np.array(one).astype(int) - np.array(other).astype(int)).max() <= 2


def test_options_reach_the_image(studio) -> None:
    def made(**options) -> bytes:
        return studio.generate("portrait", anna, seed=1, **options).images[0].tobytes()

    plain = made()
    different = [
        made(scale=0.3),
        made(start=0.5),
        made(true_cfg=3.0, negative="a person"),
        made(guidance=1.0),
    ]
    different.append(made(text_tokens=5))  # what is not there is padding, which is seen, too
    late = made(true_cfg=3.0, negative="a person", timestep_to_start_cfg=2)
    assert len({plain, late, *different}) == 7
    assert made(start=0.5) == made(start_step=2)
    assert (
        made(start_step=3)
        == studio.generate("portrait", seed=1).images[0].tobytes()
        == made(scale=0.0)
    )


def test_guidance_begins_where_it_does_with_somebody(studio) -> None:
    """Where nobody is shown, too: without an identity, at a scale of 0, and before the identity acts."""

    def made(person: Identity | None = anna, **options) -> bytes:
        known = {"true_cfg": 3.0, "negative": "a person", "seed": 1}
        return studio.generate("portrait", person, **known, **options).images[0].tobytes()

    plain, images = studio.generate("portrait", seed=1).images[0].tobytes(), set()
    for first in (0, 2, 3):
        nobody = made(None, timestep_to_start_cfg=first)
        assert (
            nobody
            == made(scale=0.0, timestep_to_start_cfg=first)
            == made(start_step=3, timestep_to_start_cfg=first)
        )
        assert (nobody == plain) == (first == 3)  # of three steps
        images.add(nobody)
    assert len(images) == 3
    assert not any(
        part._forward_hooks or part._forward_pre_hooks for part in studio.pipe.transformer.modules()
    )


def test_what_the_text_encoder_would_drop_is_refused(studio) -> None:
    with pytest.raises(PromptError, match="11 tokens and the model reads 10"):
        studio.generate("a person " * 5)
    studio.generate("a person " * 5, steps=1, text_tokens=11)
    for tokens in (0, 513):
        with pytest.raises(OptionError, match="from 1 to 512"):
            studio.generate("a person", text_tokens=tokens)
    with pytest.raises(PromptError, match="zebra"):
        studio.generate("portrait of a zebra")
    with pytest.raises(OptionError, match="at least 1"):
        studio.generate("portrait", steps=0)


def test_sizes_without_latents_are_refused(studio) -> None:
    """Two latents to a token, two pixels to a latent here, eight in FLUX; the pipeline itself would make another size."""
    for size, near in (((34, 32), "32x32"), ((32, 31), "32x32"), ((0, 32), "4x32")):
        with pytest.raises(OptionError, match=rf"multiples of 4, such as {near}\.$"):
            studio.generate("portrait", size=size)


@pytest.mark.parametrize(
    "options", [{"true_cfg": 3.0}, {"negative": "a person"}, {"true_cfg": 3.0, "negative": ""}]
)
def test_true_guidance_and_a_negative_prompt_go_together(studio, options) -> None:
    with pytest.raises(OptionError, match="give both, or neither"):
        studio.generate("portrait", **options)


@pytest.mark.parametrize("options", [{"projection": "ortho"}, {"num_zero": 0}])
def test_what_would_change_nothing_is_refused(studio, options) -> None:
    with pytest.raises(OptionError, match="with flux nothing would change by"):
        studio.generate("portrait", anna, **options)


def test_memory_levels_are_known_before_anything_is_opened() -> None:
    with pytest.raises(OptionError, match="full, 24gb"):
        load("flux", device="cpu", memory="8gb")
    with pytest.raises(OptionError, match="FLUX's"):
        load("mini", device="cpu", memory="12gb")
