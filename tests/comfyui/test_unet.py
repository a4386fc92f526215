"""Apply PuLID on SDXL in ComfyUI: the miniature's U-Net in ComfyUI's classes and in diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import openpulid as pulid
from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.pipelines.studio import Studio
from tests.support import comfyui, comfyui_networks, people
from tests.support.comfyui import call_network, requires_comfyui, sample, sdxl_conditioning

pytestmark = requires_comfyui

SIDE = 96
LATENT = 12
SIGMA = 1.5
TIMESTEP = 600
LAYOUTS = [[1, 0], [0, 1], [0], [1], [1, 0, 0]]
LEFT = torch.cat([torch.ones(LATENT, LATENT // 2), torch.zeros(LATENT, LATENT // 2)], dim=1)


@pytest.fixture(scope="module")
def studio() -> Studio:
    return pulid.load("mini", device="cpu")


@pytest.fixture(scope="module")
def identities(studio) -> tuple[Identity, Identity]:
    return studio.identify("examples/anna.png"), studio.identify("examples/ben.png")


@pytest.fixture(scope="module")
def model(studio) -> Any:
    comfyui.import_comfyui()
    return comfyui.load_miniature(studio.pipe)


@pytest.fixture(scope="module")
def adapters(model) -> Any:
    return comfyui.import_pack("adapters")


@pytest.fixture(scope="module")
def loaded(adapters, studio) -> Any:
    return adapters.load_adapter(str(studio.preset.models.adapter), "miniature")


@pytest.fixture(scope="module")
def apply(adapters, loaded) -> Callable[..., Any]:
    """Apply an identity to a model."""

    def apply(model: Any, identity: Identity, scale: float = 0.7, **options: Any) -> Any:
        defaults = {"projection": "none", "num_zero": 0}
        return adapters.apply_adapter(
            model, loaded, identity, adapters.ApplyOptions(scale, **{**defaults, **options})
        )

    return apply


@pytest.fixture(scope="module")
def prompt(studio) -> dict[str, Tensor]:
    """Text of the negative prompt, then of the positive one: text (2, 77, 192), pooled (2, D)."""
    positive, negative, pooled, negative_pooled = studio.pipe.encode_prompt(
        "portrait of a person", negative_prompt="", num_images_per_prompt=1
    )
    return {
        "text": torch.cat([negative, positive]),
        "pooled": torch.cat([negative_pooled, pooled]),
    }


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(1, 20, LATENT, LATENT, generator=torch.Generator().manual_seed(8))


def call_diffusers(studio: Studio, prompt: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Call the U-Net with a negative and a positive row."""
    time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 2)
    added = {"text_embeds": prompt["pooled"], "time_ids": time_ids}
    with torch.no_grad():
        return studio.pipe.unet(
            latents.repeat(2, 1, 1, 1), TIMESTEP, prompt["text"], added_cond_kwargs=added
        ).sample


def call_comfyui(
    model: Any,
    prompt: dict[str, Tensor],
    latents: Tensor,
    layout: list[int],
    sigma: float = SIGMA,
) -> Tensor:
    """Call the U-Net with one row per entry of the layout."""
    rows = [1 - group for group in layout]
    pooled = prompt["pooled"][rows]
    adm = torch.cat(
        [model.model.encode_adm(pooled_output=row[None], width=SIDE, height=SIDE) for row in pooled]
    )
    return call_network(
        model,
        layout,
        sigma,
        latents.repeat(len(rows), 1, 1, 1),
        torch.full((len(rows),), float(TIMESTEP)),
        prompt["text"][rows],
        y=adm,
    )


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("projection", ["none", "ortho", "ortho_v2"])
def test_call_equals_diffusers_in_every_layout(
    studio, identities, model, apply, prompt, latents, projection, masked, record_property
) -> None:
    anna, _ = identities
    mask = LEFT if masked else None
    options: dict[str, Any] = {"projection": projection, "num_zero": 5}
    with studio.adapter.use([(anna, mask)], scale=0.7, guided=True, **options):
        expected = call_diffusers(studio, prompt, latents)
    assert relative_error(call_diffusers(studio, prompt, latents), expected) > 0.01
    shown = apply(model, anna, mask=None if mask is None else mask[None], **options)
    errors = []
    for layout in LAYOUTS:
        ours = call_comfyui(shown, prompt, latents, layout)
        errors.append(relative_error(ours, expected[[1 - group for group in layout]]))
    record_property("relative_error", max(errors))
    assert max(errors) <= 1e-5, errors


def test_two_people_equal_diffusers(
    studio, identities, model, apply, adapters, loaded, prompt, latents
) -> None:
    anna, ben = identities
    options: dict[str, Any] = {"projection": "ortho_v2", "num_zero": 5}
    with studio.adapter.use([(anna, LEFT), (ben, 1 - LEFT)], scale=0.7, guided=True, **options):
        expected = call_diffusers(studio, prompt, latents)
    one = apply(model, anna, mask=LEFT[None], **options)
    both = apply(one, ben, mask=1 - LEFT[None], **options)
    shown = call_comfyui(both, prompt, latents, [1, 0])
    assert relative_error(shown, expected) <= 1e-5
    # as inputs of one node
    persons = [adapters.Person(anna, 0.7, LEFT[None]), adapters.Person(ben, 0.7, 1 - LEFT[None])]
    joined = adapters.apply_people(model, loaded, persons, adapters.ApplyOptions(1.0, **options))
    assert torch.equal(call_comfyui(joined, prompt, latents, [1, 0]), shown)
    # the first model still shows one person
    with studio.adapter.use([(anna, LEFT)], scale=0.7, guided=True, **options):
        expected = call_diffusers(studio, prompt, latents)
    assert relative_error(call_comfyui(one, prompt, latents, [1, 0]), expected) <= 1e-5


def test_odd_sizes_equal_diffusers(studio, identities, model, apply, prompt) -> None:
    anna, _ = identities
    latents = torch.randn(1, 20, 17, 13, generator=torch.Generator().manual_seed(9))
    mask = torch.zeros(17, 13)
    mask[:, :5] = 1
    with studio.adapter.use([(anna, mask)], scale=0.7, projection="ortho", num_zero=0, guided=True):
        expected = call_diffusers(studio, prompt, latents)
    ours = call_comfyui(
        apply(model, anna, mask=mask[None], projection="ortho"), prompt, latents, [1, 0]
    )
    assert relative_error(ours, expected) <= 1e-5


@pytest.mark.parametrize("projection", ["none", "ortho_v2"])
def test_several_transformer_blocks_equal_diffusers(adapters, projection, record_property) -> None:
    """In SDXL an attention has two or ten transformer blocks, in the miniature it has one."""
    unet = comfyui_networks.deep_unet()
    adapter = people.fresh(SimpleNamespace(unet=unet))
    adapter.attach(unet)
    deep = comfyui_networks.deep_unet_patcher(unet)
    loaded = adapters.LoadedAdapter(
        adapters.wrap_adapter(people.fresh(SimpleNamespace(unet=unet))), "deep"
    )
    indices = [key[2] for key, _ in find_cross_attentions(deep).values()]
    assert len(indices) == 18 and max(indices) == 2
    generator = torch.Generator().manual_seed(10)
    latents = torch.randn(2, 4, 12, 8, generator=generator)
    text = torch.randn(2, 7, 64, generator=generator)
    pooled = torch.randn(2, comfyui_networks.POOLED_WIDTH, generator=generator)
    mask = torch.zeros(12, 8)
    mask[:, :5] = 1

    def call(shown: Any) -> Tensor:
        rows = [deep.model.encode_adm(pooled_output=x[None], width=64, height=96) for x in pooled]
        time = torch.full((2,), float(TIMESTEP))
        return call_network(shown, [1, 0], SIGMA, latents, time, text, y=torch.cat(rows))

    time_ids = torch.tensor([[96, 64, 0, 0, 96, 64]] * 2)
    added = {"text_embeds": pooled, "time_ids": time_ids}
    options: dict[str, Any] = {"projection": projection, "num_zero": 5}
    with (
        adapter.use([(people.anna, mask)], scale=0.7, guided=True, **options),
        torch.no_grad(),
    ):
        expected = unet(latents, TIMESTEP, text, added_cond_kwargs=added).sample
    apply_options = adapters.ApplyOptions(0.7, mask=mask[None], **options)
    shown = adapters.apply_adapter(deep, loaded, people.anna, apply_options)
    assert relative_error(call(deep), expected) > 0.01
    error = relative_error(call(shown), expected)
    record_property("relative_error", error)
    assert error <= 1e-5


def find_cross_attentions(model: Any) -> Any:
    unet = model.get_model_object("diffusion_model")
    return comfyui.import_pack("patching").find_cross_attentions(unet)


def test_identity_acts_between_start_and_end(identities, model, apply, prompt, latents) -> None:
    shown = apply(model, identities[0], start=0.2, end=0.6)
    always = apply(model, identities[0])
    sigma_of = model.get_model_object("model_sampling").percent_to_sigma

    def act(fraction: float) -> bool:
        arguments = (prompt, latents, [1, 0], sigma_of(fraction))
        ours = call_comfyui(shown, *arguments)
        base = call_comfyui(model, *arguments)
        if torch.equal(ours, base):
            return False
        assert torch.equal(ours, call_comfyui(always, *arguments))
        return True

    acts = [act(fraction) for fraction in (0.0, 0.1, 0.2, 0.4, 0.59, 0.6, 0.9)]
    assert acts == [False, False, True, True, True, False, False]


def conditioning(prompt: dict[str, Tensor]) -> tuple[Any, Any]:
    negative, positive = (
        sdxl_conditioning(prompt["text"][k : k + 1], prompt["pooled"][k : k + 1], SIDE)
        for k in (0, 1)
    )
    return positive, negative


def test_image_equals_diffusers(studio, identities, model, apply, prompt, record_property) -> None:
    request: dict[str, Any] = {"seed": 7, "negative_prompt": "", "identity": identities[0]}
    expected = studio.generate("portrait of a person", **request).images[0]
    latent = torch.zeros(1, 20, LATENT, LATENT)
    shown = apply(model, identities[0])
    schedule: dict[str, Any] = {"sampler": "dpmpp_2m", "scheduler": "sgm_uniform"}
    sampled = sample(shown, *conditioning(prompt), latent, steps=20, **schedule)
    with torch.no_grad():
        decoded = studio.pipe.vae.decode(sampled).sample[0].permute(1, 2, 0)
    ours = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    difference = np.abs(ours - np.asarray(expected, dtype=float))
    record_property("largest_difference_of_255", difference.max())
    record_property("mean_difference_of_255", difference.mean())
    assert difference.max() <= 1


def test_models_do_not_see_each_other(identities, model, apply, prompt) -> None:
    latent = torch.zeros(1, 20, LATENT, LATENT)

    def run(patcher: Any) -> Tensor:
        return sample(patcher, *conditioning(prompt), latent)

    options = model.model_options["transformer_options"]
    base = run(model)
    first = apply(model, identities[0])
    second = apply(model, identities[1])
    shown = run(first)
    assert not torch.equal(shown, base)
    assert not torch.equal(run(second), shown)
    assert torch.equal(run(first), shown)
    assert torch.equal(run(model), base)
    assert torch.equal(run(apply(model, identities[0], 0.0)), base)
    assert torch.equal(run(apply(first, identities[1], 0.0)), shown)
    assert model.model_options["transformer_options"] is options and not options.get("patches")
    assert not options.get("patches_replace") and not model.wrappers.get("diffusion_model")


def test_unloaded_models_run_again(identities, model, apply, prompt) -> None:
    from comfy import model_management

    shown = apply(model, identities[0])
    latent = torch.zeros(1, 20, LATENT, LATENT)
    first = sample(shown, *conditioning(prompt), latent)
    model_management.unload_all_models()
    assert torch.equal(sample(shown, *conditioning(prompt), latent), first)


def test_batches_and_two_positive_prompts(identities, model, apply, prompt) -> None:
    """Every image of a batch is that of a batch of one, in any layout of ComfyUI's own."""
    shown = apply(model, identities[0], mask=LEFT[None], projection="ortho_v2")
    latent = torch.zeros(2, 20, LATENT, LATENT)
    positive, negative = conditioning(prompt)
    both = sample(shown, positive, negative, latent)
    alone = sample(shown, positive, negative, latent[:1])
    # a batch sums in another order, and how depends on the processor
    assert relative_error(both[:1], alone) <= 1e-3
    assert torch.isfinite(sample(shown, positive * 2, negative, latent)).all()
    long = [[torch.cat([positive[0][0]] * 2, dim=1)[:, :100], positive[0][1]]]  # two calls
    assert torch.isfinite(sample(shown, long, negative, latent)).all()


def test_every_image_of_a_batch_has_its_mask(identities, model, apply, prompt) -> None:
    masks = torch.stack([LEFT, 1 - LEFT])
    latent = torch.zeros(2, 20, LATENT, LATENT)

    def run(mask: Tensor) -> Tensor:
        return sample(apply(model, identities[0], mask=mask), *conditioning(prompt), latent)

    both = run(masks)
    for image in (0, 1):
        alone = run(masks[image : image + 1])
        assert relative_error(both[image], alone[image]) <= 1e-5
        assert relative_error(both[1 - image], alone[1 - image]) > 1e-2
    with pytest.raises(OptionError, match="has 3 masks, and the batch has 2 images"):
        run(LEFT.repeat(3, 1, 1))


class OtherPack:
    """Attention of another pack: the object that IP-Adapter and InstantID share."""

    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: Any) -> Tensor:
        attend = comfyui.import_pack("patches").attend_to_text
        return attend(query, key, value, options) + self.amount

    def add(self, callback: Any, **kwargs: Any) -> None:
        raise AssertionError("the patch of another pack is not changed")


def test_other_packs_work_together(identities, model, apply, prompt, latents) -> None:
    place = ("input", 3, 0)
    layout = [1, 0]
    other = model.clone()
    other.set_model_attn2_replace(OtherPack(0.5), *place)
    base = call_comfyui(other, prompt, latents, layout)
    after = apply(other, identities[0])
    assert torch.equal(call_comfyui(other, prompt, latents, layout), base)
    # the same, added to ours as those packs do; a second run has the second weight alone
    ours = apply(model, identities[0])
    plain = call_comfyui(ours, prompt, latents, layout)
    expected = call_comfyui(after, prompt, latents, layout)
    assert relative_error(expected, plain) > 1e-3
    outputs = {
        weight: call_comfyui(add_to_attention(ours, place, weight), prompt, latents, layout)
        for weight in (0.2, 0.5)
    }
    assert relative_error(outputs[0.5], expected) <= 1e-5
    assert relative_error(outputs[0.2], expected) > 1e-3
    assert torch.equal(call_comfyui(ours, prompt, latents, layout), plain)


def add_to_attention(model: Any, place: tuple[str, int, int], weight: float) -> Any:
    """Return a clone with a constant in an attention, as IP-Adapter's pack adds its image."""
    clone = model.clone()
    options = clone.model_options["transformer_options"]
    patches = options["patches_replace"]["attn2"] = options["patches_replace"]["attn2"].copy()
    patches[place].add(
        lambda out, q, k, v, options, weight, **kwargs: torch.full_like(out, weight),
        weight=weight,
        sigma_start=1e9,
        sigma_end=0.0,
    )
    return clone


def test_unsuitable_values_raise(identities, model, apply, adapters, loaded) -> None:
    with pytest.raises(OptionError, match="scale must be"):
        apply(model, identities[0], -1.0)
    with pytest.raises(OptionError, match="start and end must be"):
        apply(model, identities[0], start=2.0)
    stranger = replace(identities[0], models={"w600k_r50": "0", "EVA02": "0"})
    with pytest.raises(OptionError, match=r"in Load face models \(antelopev2 for published"):
        apply(model, stranger)
    unet = model.get_model_object("diffusion_model")
    widths = comfyui.import_pack("patching").find_layer_widths(unet)
    with pytest.raises(WeightsError, match="another U-Net"):
        loaded.patcher.model.check_layers({key: (w, 2048) for key, (w, _) in widths.items()})
