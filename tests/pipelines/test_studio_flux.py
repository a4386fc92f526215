"""A studio with a tiny FLUX: options reach pipeline and adapter, seeds are per image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from openpulid.errors import NonFiniteError, OptionError, PromptError
from openpulid.identity.identity import Identity
from openpulid.pipelines.loading import load
from openpulid.pipelines.presets import (
    PRESETS,
    flux,
    flux_krea,
    flux_schnell,
    mini_flux,
    mini_flux_4step,
)
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.request_inputs import Person
from openpulid.pipelines.studio import Studio
from tests.support.people import anna, ben
from tests.support.tiny_flux import fresh, tiny_pipe


class UnusedExtractor:
    """Extractor of a studio that receives identities alone."""

    models = anna.models


@pytest.fixture(scope="module")
def studio() -> Studio:
    pipe = tiny_pipe()
    preset = flux().with_models(use_half_precision=False, size_multiple=4)
    preset = preset.with_models(native_side=32, min_side=4)
    preset = preset.with_defaults(
        num_inference_steps=3, width=32, height=32, max_sequence_length=10
    )
    return Studio(pipe, fresh(pipe), UnusedExtractor(), preset)


def test_presets_have_their_defaults() -> None:
    defaults = flux().defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (28, 4.0)
    assert (defaults.max_sequence_length, defaults.timestep_to_start_cfg) == (128, 1)
    assert defaults.identity.model_dump(exclude_none=True) == {"scale": 1.0, "start": 0, "end": 1}
    assert flux_krea().models.pipeline == "flux-krea-base"
    assert flux_schnell().defaults.num_inference_steps == 4
    request = GenerationRequest(prompt="portrait", guidance_scale=3.0)
    with pytest.raises(OptionError, match="'flux-schnell' does not support: guidance_scale"):
        flux_schnell().resolve(request)
    assert flux().published[0] == "flux-dev" and "pulid-flux-v0.9.1" in flux().published
    assert all(PRESETS[name]().name == name for name in PRESETS)


def test_each_seed_gives_its_image_alone(studio) -> None:
    both = studio.generate("portrait of a person", anna, seed=4, num_images=2)
    alone = studio.generate("portrait of a person", anna, seed=5)
    assert both.images[0].size == (32, 32) and both.images[1].tobytes() == alone.images[0].tobytes()
    together = studio.generate("portrait of a person", anna, seed=4, num_images=2, batch_size=2)
    for one, other in zip(both.images, together.images, strict=True):
        assert np.abs(np.array(one).astype(int) - np.array(other).astype(int)).max() <= 2


def test_options_reach_the_image(studio) -> None:
    def made(**options) -> bytes:
        return studio.generate("portrait", anna, seed=1, **options).images[0].tobytes()

    plain = made()
    different = [
        made(scale=0.3),
        made(start=0.5),
        made(true_cfg_scale=3.0, negative_prompt="a person"),
        made(guidance_scale=1.0),
    ]
    different.append(
        made(max_sequence_length=5)
    )  # what is not there is padding, which is seen, too
    late = made(true_cfg_scale=3.0, negative_prompt="a person", timestep_to_start_cfg=2)
    assert len({plain, late, *different}) == 7
    assert made(start=0.5) == made(start_step=2)
    assert studio.generate("portrait", seed=1).images[0].tobytes() == made(scale=0.0)
    with pytest.raises(OptionError, match="start_step 3 is after the last step, 2"):
        made(start_step=3)


def test_guidance_starts_at_the_same_step_without_identity(studio) -> None:
    """Also without an identity, at scale 0, and before the identity acts."""

    def made(person: Identity | None = anna, **options) -> bytes:
        known = {"true_cfg_scale": 3.0, "negative_prompt": "a person", "seed": 1}
        return studio.generate("portrait", person, **known, **options).images[0].tobytes()

    plain, images = studio.generate("portrait", seed=1).images[0].tobytes(), set()
    for first in (0, 2):
        nobody = made(None, timestep_to_start_cfg=first)
        assert nobody == made(scale=0.0, timestep_to_start_cfg=first)
        images.add(nobody)
    assert len(images | {plain}) == 3
    with pytest.raises(OptionError, match="timestep_to_start_cfg 3 is after the last step, 2"):
        made(None, timestep_to_start_cfg=3)
    assert not any(
        part._forward_hooks or part._forward_pre_hooks for part in studio.pipe.transformer.modules()
    )


def test_long_prompts_are_cut_and_unknown_words_are_refused(studio, caplog) -> None:
    studio.generate("a person " * 5)
    expected = (
        "the prompt has 11 tokens and the model reads 10; it ignores the end, 'person'; "
        "max_sequence_length (--text-tokens) may be up to 512"
    )
    assert expected in [record.getMessage() for record in caplog.records]
    caplog.clear()
    studio.generate("a person " * 5, num_inference_steps=1, max_sequence_length=11)
    assert not [record for record in caplog.records if record.name.startswith("openpulid")]
    for tokens, limit in ((0, "at least 1"), (513, "at most 512")):
        with pytest.raises(OptionError, match=f"max_sequence_length must be {limit}"):
            studio.generate("a person", max_sequence_length=tokens)
    with pytest.raises(PromptError, match="zebra"):
        studio.generate("portrait of a zebra")
    with pytest.raises(OptionError, match="at least 1"):
        studio.generate("portrait", num_inference_steps=0)


def test_sizes_of_the_miniature_are_multiples_of_its_tokens() -> None:
    for preset in (mini_flux(), mini_flux_4step()):
        resolved = preset.resolve(GenerationRequest(prompt="portrait", width=112, height=96))
        assert (resolved.width, resolved.height) == (112, 96)
        with pytest.raises(OptionError, match="multiples of 16"):
            preset.resolve(GenerationRequest(prompt="portrait", width=104, height=96))


def test_sizes_must_be_multiples_of_the_latent_patch(studio) -> None:
    """The pipeline itself would change a size that is no multiple of its tokens' pixels."""
    for size, near in (((34, 32), "32x32"), ((32, 31), "32x32"), ((1, 32), "4x32")):
        with pytest.raises(OptionError, match=rf"multiples of 4, for example {near}\.$"):
            studio.generate("portrait", width=size[0], height=size[1])


@pytest.mark.parametrize(
    "options",
    [
        {"true_cfg_scale": 3.0},
        {"negative_prompt": "a person"},
    ],
)
def test_true_cfg_requires_a_negative_prompt_and_vice_versa(studio, options) -> None:
    with pytest.raises(OptionError, match="set both or neither"):
        studio.generate("portrait", **options)


def test_empty_negative_prompt_is_one(studio) -> None:
    plain = studio.generate("portrait", seed=1).images[0].tobytes()
    guided = studio.generate("portrait", seed=1, true_cfg_scale=3.0, negative_prompt="")
    assert guided.images[0].tobytes() != plain
    without = studio.generate("portrait", seed=1, negative_prompt="")
    assert without.images[0].tobytes() == plain


def test_signs_unknown_to_t5_are_left_out(studio, caplog) -> None:
    plain = studio.generate("portrait of a person").images[0].tobytes()
    assert studio.generate("portrait of a person 😀~").images[0].tobytes() == plain
    assert "the model does not know '😀', '~'; left out of the prompt" in caplog.text
    caplog.clear()
    studio.generate("{portrait|person}")
    assert "no effect in the prompt, it is read as plain words: '{portrait|person}'" in caplog.text
    assert "does not know '{', '|', '}'; left out" in caplog.text


def test_overflow_of_the_transformer_is_refused(studio) -> None:
    bias = studio.pipe.transformer.proj_out.bias
    saved = bias.detach().clone()
    with torch.no_grad():
        bias[0] = float("nan")
    try:
        with pytest.raises(NonFiniteError, match="the transformer gave NaN or infinity in step 1,"):
            studio.generate("portrait")
    finally:
        with torch.no_grad():
            bias.copy_(saved)


@pytest.mark.parametrize("options", [{"projection": "ortho"}, {"num_zero": 0}])
def test_sdxl_options_are_refused(studio, options) -> None:
    with pytest.raises(OptionError, match="preset 'flux' does not support: "):
        studio.generate("portrait", anna, **options)


def test_memory_levels_are_checked_before_loading() -> None:
    with pytest.raises(OptionError, match="choose one of full, 24gb"):
        load("flux", device="cpu", memory="8gb")
    with pytest.raises(OptionError, match="choose one of full, 12gb, 8gb, 6gb"):
        load("sdxl", device="cpu", memory="16gb")
    with pytest.raises(OptionError, match="preset 'mini' has no memory levels; leave memory out"):
        load("mini", device="cpu", memory="12gb")


def test_people_of_a_request_give_the_same_image_as_objects(studio, tmp_path) -> None:
    anna.save(tmp_path / "anna.safetensors")
    ben.save(tmp_path / "ben.safetensors")
    left = torch.zeros(32, 32)
    left[:, :16] = 1
    request = GenerationRequest(
        "portrait",
        seed=1,
        people=[
            Person(identity=tmp_path / "anna.safetensors", box=(0, 0, 0.5, 1), scale=0.5),
            Person(identity=tmp_path / "ben.safetensors", box=(0.5, 0, 1, 1)),
        ],
    )
    both = studio.generate(request).images[0]
    objects = [(anna, 0.5 * left), (ben, 1 - left)]
    assert both.tobytes() == studio.generate("portrait", objects, seed=1).images[0].tobytes()
    one = request.model_copy(update={"people": request.people[:1]})
    assert studio.generate(one).images[0].tobytes() != both.tobytes()
