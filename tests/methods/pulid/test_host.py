"""PuLID in another program's network: the same arithmetic as in diffusers' hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

from openpulid.errors import OptionError
from openpulid.methods.hooks import SchedulePosition
from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux, precompute_projections
from openpulid.methods.pulid.flux_attention import FluxCall, FluxIdentity
from openpulid.methods.pulid.host_flux import FluxHostIdentity
from openpulid.methods.pulid.host_sdxl import SDXLHostIdentity
from openpulid.methods.pulid.masks import stack_masks
from openpulid.methods.pulid.projection import PROJECTIONS
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.methods.pulid.sdxl_attention import (
    AttentionOptions,
    IdentityAttention,
    SDXLInjection,
    cross_attentions,
)
from openpulid.methods.transformer_kinds import identity_blocks
from tests.support import people, tiny_flux
from tests.support.people import anna, ben

HEIGHT, WIDTH = 8, 6
LEFT = torch.cat([torch.ones(HEIGHT, WIDTH // 2), torch.zeros(HEIGHT, WIDTH // 2)], dim=1)
LAYOUTS = [[1, 0], [0, 1], [0], [1], [1, 0, 0]]
"""ComfyUI's `cond_or_uncond`: 1 is the negative prompt."""


def rows(layout: list[int], per_prompt: int = 2) -> list[bool]:
    return [group == 1 for group in layout for _ in range(per_prompt)]


@pytest.fixture(scope="module")
def sdxl(tiny_pipeline) -> tuple[Any, PuLID]:
    pipe = tiny_pipeline()
    return pipe.unet, people.fresh(pipe)


def reference_sdxl(
    unet: Any,
    adapter: PuLID,
    shown: Any,
    options: AttentionOptions,
    tensors: tuple[torch.Tensor, torch.Tensor],
    is_negative: bool,
) -> torch.Tensor:
    """Compute a layer with the hooks of diffusers' U-Net, for rows of one kind."""
    query, text = tensors
    keys_values = adapter.keys_values(adapter.encode_people([shown]))
    identity = shown[0][0]
    tokens = adapter.unconditional(identity.id_cond, identity.hidden)[:, None]
    negative = adapter.keys_values(tokens)
    injection = SDXLInjection(
        keys_values,
        lambda: negative,
        lambda: True,
        lambda timestep: SchedulePosition(0.0),
        options,
        stack_masks([shown]),
    )
    latents = torch.zeros(2 * len(query), 4, HEIGHT, WIDTH)
    call = injection._prepare(unet, latents, True, None)
    attention = IdentityAttention("1", cross_attentions(unet)["1"].heads, injection)
    both = attention.add_identity(torch.cat([query] * 2), torch.cat([text] * 2), call)
    return both[: len(query)] if is_negative else both[len(query) :]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("projection", PROJECTIONS)
@torch.no_grad()
def test_sdxl_rows_match_hooks(sdxl, projection, layout) -> None:
    unet, adapter = sdxl
    layer = cross_attentions(unet)["1"]
    options = AttentionOptions(0.8, projection=projection, num_zero=5)
    generator = torch.Generator().manual_seed(3)
    is_negative = rows(layout)
    shape = (len(is_negative), HEIGHT * WIDTH, layer.inner_dim)
    query, text = torch.randn(2, *shape, generator=generator)
    host = SDXLHostIdentity.prepare(adapter, anna, options)
    added = host.contribution("1", query, text, layer.heads, is_negative, (HEIGHT, WIDTH))
    assert added.abs().max() > 0.1
    for row, negative in enumerate(is_negative):
        tensors = (query[row : row + 1], text[row : row + 1])
        expected = reference_sdxl(unet, adapter, [(anna, None)], options, tensors, negative)
        assert torch.allclose(tensors[1] + added[row], expected, atol=1e-5)


@torch.no_grad()
def test_sdxl_people_with_masks_add_up(sdxl) -> None:
    unet, adapter = sdxl
    layer = cross_attentions(unet)["1"]
    options = AttentionOptions(0.8, num_zero=5)
    generator = torch.Generator().manual_seed(4)
    query, text = torch.randn(2, 1, HEIGHT * WIDTH, layer.inner_dim, generator=generator)
    shown = [(anna, LEFT), (ben, 1 - LEFT)]
    for negative in (False, True):
        added = torch.zeros_like(text)
        for identity, mask in shown:
            host = SDXLHostIdentity.prepare(adapter, identity, options, mask)
            added += host.contribution("1", query, text, layer.heads, [negative], (HEIGHT, WIDTH))
        expected = reference_sdxl(unet, adapter, shown, options, (query, text), negative)
        assert torch.allclose(text + added, expected, atol=1e-5)


@pytest.fixture(scope="module")
def flux() -> tuple[FluxPipeline, PuLIDFlux]:
    pipe = tiny_flux.tiny_pipe()
    return pipe, tiny_flux.fresh(pipe)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_flux_rows_match_hooks(flux, layout, masked) -> None:
    pipe, adapter = flux
    blocks = identity_blocks(pipe.transformer)
    layers = dict(zip(blocks, adapter.layers, strict=True))
    negative_tokens = adapter.unconditional(anna.id_cond, anna.hidden)[:, None]
    negative = precompute_projections(layers, negative_tokens)
    mask = LEFT if masked else None
    identity = FluxIdentity(
        layers,
        precompute_projections(layers, adapter.encode_people([[(anna, None)]])),
        lambda: negative,
        0.9,
        stack_masks([[(anna, mask)]]),
    )
    is_negative = rows(layout)
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(len(is_negative), HEIGHT * WIDTH, 32, generator=generator)
    host = FluxHostIdentity.prepare(adapter, blocks, anna, 0.9, mask)
    for block in blocks:
        added = host.contribution(block, image, is_negative, (HEIGHT, WIDTH))
        assert added.abs().max() > 0.01
        for row, is_row_negative in enumerate(is_negative):
            call = FluxCall(
                True,
                identity.keys_values(is_row_negative),
                regions=identity.resize_masks((HEIGHT, WIDTH), 1),
            )
            expected = identity.add_to(image[row : row + 1], block, call)[0]
            assert torch.allclose(image[row] + added[row], expected, atol=1e-5)


@torch.no_grad()
def test_weights_in_less_precision_are_only_stored_in_it(flux) -> None:
    """A program may keep weights in less precision than the tokens: the products are float32."""
    pipe, _ = flux
    adapter = tiny_flux.fresh(pipe, seed=3)
    blocks = identity_blocks(pipe.transformer)
    image = torch.randn(1, HEIGHT * WIDTH, 32, generator=torch.Generator().manual_seed(5))
    results = []
    for dtype in (torch.bfloat16, torch.float32):  # the second has the rounded weights
        for layer in adapter.layers:
            layer.to_q.to(dtype)
            layer.to_out.to(dtype)
        host = FluxHostIdentity.prepare(adapter, blocks, anna)
        results.append(host.contribution(blocks[0], image, [False], (HEIGHT, WIDTH)))
    assert torch.equal(*results)


@torch.no_grad()
def test_released_copies_are_created_again(sdxl) -> None:
    unet, adapter = sdxl
    layer = cross_attentions(unet)["1"]
    host = SDXLHostIdentity.prepare(adapter, anna, AttentionOptions(0.8), LEFT)
    query, text = torch.randn(
        2, 1, HEIGHT * WIDTH, layer.inner_dim, generator=torch.Generator().manual_seed(6)
    )
    arguments = ("1", query, text, layer.heads, [False], (HEIGHT, WIDTH))
    first = host.contribution(*arguments)
    host.release()
    assert torch.equal(host.contribution(*arguments), first)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_every_image_of_a_batch_has_its_mask(sdxl, flux, layout) -> None:
    unet, adapter = sdxl
    layer = cross_attentions(unet)["1"]
    pipe, flux_adapter = flux
    masks = torch.stack([LEFT, torch.zeros_like(LEFT)])
    generator = torch.Generator().manual_seed(7)
    is_negative = rows(layout)
    query = torch.randn(len(is_negative), HEIGHT * WIDTH, layer.inner_dim, generator=generator)
    image = torch.randn(len(is_negative), HEIGHT * WIDTH, 32, generator=generator)
    blocks = identity_blocks(pipe.transformer)

    def contributions(masks: torch.Tensor, chosen: slice) -> tuple[torch.Tensor, torch.Tensor]:
        negative = is_negative[chosen]
        unet_host = SDXLHostIdentity.prepare(adapter, anna, AttentionOptions(0.8), masks)
        flux_host = FluxHostIdentity.prepare(flux_adapter, blocks, anna, 0.8, masks)
        number, grid = len(negative) // len(layout) or 1, (HEIGHT, WIDTH)
        part = query[chosen]
        return (
            unet_host.contribution("1", part, part, layer.heads, negative, grid, number),
            flux_host.contribution(blocks[0], image[chosen], negative, grid, number),
        )

    together = contributions(masks, slice(None))
    for row in range(len(is_negative)):
        alone = contributions(masks[row % 2], slice(row, row + 1))
        for ours, expected in zip(together, alone, strict=True):
            assert torch.allclose(ours[row], expected[0], atol=1e-5)
            assert bool(expected.any()) is (row % 2 == 0)


@torch.no_grad()
def test_mask_of_another_ratio_is_cropped(sdxl, caplog: pytest.LogCaptureFixture) -> None:
    unet, adapter = sdxl
    layer = cross_attentions(unet)["1"]
    query = torch.randn(2, HEIGHT * WIDTH, layer.inner_dim)
    left = LEFT.repeat_interleave(2, 0).repeat_interleave(2, 1)
    wide = torch.nn.functional.pad(left, (5, 5), value=1.0)

    def contribution(mask: torch.Tensor) -> torch.Tensor:
        host = SDXLHostIdentity.prepare(adapter, anna, AttentionOptions(0.8), mask)
        grid = (HEIGHT, WIDTH)
        return host.contribution("1", query, query, layer.heads, rows([0]), grid, num_images=2)

    expected = contribution(LEFT)
    assert not caplog.messages
    assert torch.allclose(contribution(wide), expected, atol=1e-6)
    (message,) = caplog.messages
    assert "is cropped to the ratio 0.75" in message


@torch.no_grad()
def test_wrong_number_of_masks_raises(sdxl) -> None:
    unet, adapter = sdxl
    layer = cross_attentions(unet)["1"]
    host = SDXLHostIdentity.prepare(adapter, anna, AttentionOptions(0.8), LEFT.repeat(3, 1, 1))
    query = torch.zeros(4, HEIGHT * WIDTH, layer.inner_dim)
    arguments = (query, query, layer.heads, rows([1, 0]), (HEIGHT, WIDTH))
    with pytest.raises(OptionError, match="has 3 masks, and the batch has 2 images"):
        host.contribution("1", *arguments, num_images=2)


@torch.no_grad()
def test_mask_on_merged_positions_raises(sdxl) -> None:
    unet, adapter = sdxl
    layer = cross_attentions(unet)["1"]
    host = SDXLHostIdentity.prepare(adapter, anna, AttentionOptions(0.8), LEFT)
    merged = torch.zeros(1, HEIGHT * WIDTH - 5, layer.inner_dim)
    with pytest.raises(OptionError, match="token merging"):
        host.contribution("1", merged, merged, layer.heads, [False], (HEIGHT, WIDTH))


def test_negative_scale_raises(flux) -> None:
    pipe, adapter = flux
    assert isinstance(adapter.encoder, IDFormer)
    with pytest.raises(OptionError, match="scale must be"):
        FluxHostIdentity.prepare(adapter, identity_blocks(pipe.transformer), anna, -1.0)
