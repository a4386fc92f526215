"""The patch objects with shapes recorded in ComfyUI, without ComfyUI."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from openpulid.methods.pulid.host_flux import FluxHostIdentity
from openpulid.methods.pulid.host_sdxl import SDXLHostIdentity
from openpulid.methods.pulid.sdxl_attention import AttentionOptions, cross_attentions
from openpulid.methods.transformer_kinds import identity_blocks
from tests.support import people, tiny_flux
from tests.support.comfyui import import_pack
from tests.support.people import anna, ben

calls, patches = import_pack("calls"), import_pack("patches")

GRID = (9, 7)
"""Positions of latents of 17 x 13 at the second level."""

ROWS, COLUMNS, NUM_TEXT, NUM_REFERENCE = 4, 3, 7, 4


def attend_to_text(query: Tensor, key: Tensor, value: Tensor, options: Any) -> Tensor:
    return query * 0.5


@pytest.fixture(scope="module")
def sdxl(tiny_pipeline) -> tuple[Any, Any]:
    pipe = tiny_pipeline()
    return cross_attentions(pipe.unet)["1"], people.fresh(pipe)


def scheduled(identity: Any, start: float = 1e9, end: float = 0.0) -> Any:
    return patches.ScheduledIdentity(identity, start, end)


def unet_options(sigma: float = 5.0, groups: tuple[int, ...] = (1, 0)) -> dict[str, Any]:
    return {
        calls.KEY: calls.NetworkCall(sigma, 17, 13, 1, 77),
        "cond_or_uncond": list(groups),
        "activations_shape": [len(groups), 16, *GRID],
        "n_heads": 2,
        "sigmas": torch.tensor([sigma]),
    }


@pytest.fixture
def attention_patch(sdxl) -> Any:
    _, adapter = sdxl
    identity = SDXLHostIdentity.prepare(adapter, anna, AttentionOptions(0.8))
    return patches.AttentionPatch((scheduled(identity, 10.0, 2.0),), attend_to_text, key="1")


@pytest.fixture
def query(sdxl) -> Tensor:
    layer, _ = sdxl
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, GRID[0] * GRID[1], layer.inner_dim, generator=generator)


@torch.no_grad()
def test_negative_row_is_that_of_no_identity(sdxl, attention_patch, query) -> None:
    layer, _ = sdxl
    (entry,) = attention_patch.identities
    ours = attention_patch(query, query, query, {**unet_options(), "n_heads": layer.heads})
    text = attend_to_text(query, query, query, {})
    for row, is_negative in enumerate((True, False)):
        one = slice(row, row + 1)
        added = entry.identity.contribution(
            "1", query[one], text[one], layer.heads, [is_negative], GRID
        )
        assert torch.allclose(ours[one], text[one] + added, atol=1e-5)


@pytest.mark.parametrize(("sigma", "acts"), [(11, False), (10, True), (3, True), (2, False)])
@torch.no_grad()
def test_identity_acts_between_two_noise_levels(sdxl, attention_patch, query, sigma, acts) -> None:
    layer, _ = sdxl
    options = {**unet_options(sigma), "n_heads": layer.heads}
    ours = attention_patch(query, query, query, options)
    assert torch.equal(ours, query * 0.5) is not acts


@torch.no_grad()
def test_identities_do_not_reach_the_patch_they_are_added_to(attention_patch) -> None:
    (entry,) = attention_patch.identities
    both = patches.set_identity(attention_patch, entry, patches.AttentionPatch)
    assert len(both.identities) == 2 and both.key == "1" and both.previous is attend_to_text
    assert len(attention_patch.identities) == 1
    copied = copy.deepcopy(attention_patch)
    copied.add(lambda out, *args, **kwargs: out)
    both.add(lambda out, *args, **kwargs: out)
    assert not attention_patch.added
    assert copied.identities[0] is entry  # its tensors are not copied


class Movable:
    """A patch of another pack with a model and tensors."""

    def __init__(self) -> None:
        self.places: list[Any] = []

    def to(self, place: Any) -> Movable:
        self.places.append(place)
        return self

    def models(self) -> list[str]:
        return ["model"]


def test_patch_of_other_pack_follows_the_model(attention_patch) -> None:
    other = Movable()
    patch = patches.set_identity(other, attention_patch.identities[0], patches.AttentionPatch)
    assert patch.models() == ["model"] and not attention_patch.models()
    assert patch.to("cpu") is patch and other.places == ["cpu"]


@pytest.fixture(scope="module")
def flux() -> tuple[FluxHostIdentity, FluxHostIdentity]:
    pipe = tiny_flux.tiny_pipe()
    adapter = tiny_flux.fresh(pipe)
    blocks = identity_blocks(pipe.transformer)
    return tuple(FluxHostIdentity.prepare(adapter, blocks, x) for x in (anna, ben))


def transformer_options(img_slice: list[int] | None = None) -> dict[str, Any]:
    call = calls.NetworkCall(0.5, 2 * ROWS, 2 * COLUMNS - 1, 2, NUM_TEXT)
    options = {calls.KEY: call, "cond_or_uncond": [1, 0]}
    return options if img_slice is None else {**options, "img_slice": img_slice}


def change_image(args: Any) -> dict[str, Tensor]:
    """A block that changes its argument in place and returns it, as ComfyUI's do."""
    args["img"] += 1
    return {"img": args["img"], **({"txt": args["txt"]} if "txt" in args else {})}


@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize("has_slice", [False, True])
@torch.no_grad()
def test_only_generated_tokens_change(flux, kind, has_slice) -> None:
    """Neither text nor the tokens of reference images, which follow the generated ones."""
    num_image = ROWS * COLUMNS + NUM_REFERENCE
    first = 0 if kind == "double" else NUM_TEXT
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(2, first + num_image, 32, generator=generator)
    options = transformer_options([NUM_TEXT, NUM_TEXT + num_image] if has_slice else None)
    args = {"img": image.clone(), "transformer_options": options}
    if kind == "double":
        args["txt"] = torch.zeros(2, NUM_TEXT, 32)
    patch = patches.BlockPatch(tuple(map(scheduled, flux)), block=(kind, 0))
    output = patch(args, {"original_block": change_image})["img"]
    expected = image + 1
    generated = slice(first, first + ROWS * COLUMNS)
    base = expected[:, generated].clone()
    for identity in flux:
        expected[:, generated] += identity.contribution(
            (kind, 0), base, [True, False], (ROWS, COLUMNS)
        )
    assert torch.allclose(output, expected, atol=1e-6)
    assert not torch.allclose(output[:, generated], base, atol=1e-2)


@torch.no_grad()
def test_only_generated_tokens_change_after_blocks(flux) -> None:
    """Not those of reference images and of padding; frames one by one."""
    num_tokens, num_frames = ROWS * COLUMNS, 2
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, num_frames * num_tokens + NUM_REFERENCE, 32, generator=generator)
    text = torch.zeros(2, NUM_TEXT, 32)
    call = calls.NetworkCall(0.5, 2 * ROWS, 2 * COLUMNS - 1, 2, NUM_TEXT, num_frames)
    options = {calls.KEY: call, "cond_or_uncond": [1, 0]}
    patch = patches.BlockOutputPatch(tuple(map(scheduled, flux)))
    args = {"img": image, "txt": text, "block_index": 1, "transformer_options": options}
    without = patch(args)  # the adapter has nothing after this block
    assert without["img"] is image and without["txt"] is text
    output = patch({**args, "block_index": 0})
    expected = image.clone()
    for first in (0, num_tokens):
        frame = image[:, first : first + num_tokens]
        for identity in flux:
            expected[:, first : first + num_tokens] += identity.contribution(
                ("double", 0), frame, [True, False], (ROWS, COLUMNS)
            )
    assert torch.allclose(output["img"], expected, atol=1e-6) and output["txt"] is text
    assert torch.equal(output["img"][:, -NUM_REFERENCE:], image[:, -NUM_REFERENCE:])


@pytest.mark.parametrize("is_keyword", [False, True])
def test_call_is_described_in_a_copy_of_the_options(is_keyword) -> None:
    options = {"sigmas": torch.tensor([3.0, 3.0]), "cond_or_uncond": [0]}
    latents, context = torch.zeros(1, 16, 4, 11, 6), torch.zeros(1, 5, 8)
    received = []

    class Executor:
        class_obj = SimpleNamespace(patch_size=2)

        def __call__(self, *args: Any, **kwargs: Any) -> None:
            received.append(kwargs["transformer_options"] if is_keyword else args[-1])

    arguments: Any = (latents, torch.ones(1), context)
    if is_keyword:
        calls.describe_call(Executor(), *arguments, transformer_options=options)
    else:
        calls.describe_call(Executor(), *arguments, None, options)
    call = calls.NetworkCall.of(received[0])
    assert (call.sigma, call.token_grid, call.num_text_tokens) == (3.0, (6, 3), 5)
    assert call.num_frames == 4
    assert calls.KEY not in options


def test_rows_follow_the_groups() -> None:
    options = {"cond_or_uncond": [1, 0, 0]}
    assert calls.find_negative_rows(options, 6) == (True, True, False, False, False, False)
    assert calls.count_images(options, 6) == 2
