"""Apply PuLID on FLUX and Chroma in ComfyUI: the same tiny weights as in diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.pulid.flux import PuLIDFlux, precompute_projections
from openpulid.methods.pulid.flux_attention import FluxCall, FluxIdentity
from openpulid.methods.pulid.masks import stack_masks
from openpulid.methods.transformer_kinds import select_block_keys
from tests.support import comfyui, tiny_flux
from tests.support.comfyui import call_network, requires_comfyui, sample
from tests.support.people import anna, ben

pytestmark = requires_comfyui

HEIGHT, WIDTH = 10, 6
ROWS, COLUMNS = HEIGHT // 2, WIDTH // 2
SIGMA = 0.7
LAYOUTS = [[1, 0], [0, 1], [0], [1], [1, 0, 0]]
LEFT = torch.tensor([[1.0, 0.0, 0.0]]).expand(ROWS, COLUMNS).contiguous()


@pytest.fixture(scope="module")
def transformer() -> Any:
    torch.manual_seed(0)
    return tiny_flux.tiny_transformer(in_channels=64).eval()


@pytest.fixture(scope="module")
def flux(transformer) -> Any:
    comfyui.import_comfyui()
    return comfyui.flux_patcher(transformer)


@pytest.fixture(scope="module")
def chroma(transformer) -> Any:
    comfyui.import_comfyui()
    return comfyui.chroma_patcher(transformer)


def create_adapter(transformer: Any) -> PuLIDFlux:
    class Holder:
        def __init__(self) -> None:
            self.transformer = transformer

    torch.manual_seed(1)
    from openpulid.methods.pulid.encoders import IDFormer

    encoder = IDFormer(**tiny_flux.SMALL, output_dim=16, hidden_dim=16)
    adapter = PuLIDFlux.for_transformer(transformer, encoder, dim_head=8, heads=2).eval()
    for layer in adapter.layers:
        torch.nn.init.normal_(layer.to_out.weight, std=0.5)
    return adapter


@pytest.fixture(scope="module")
def adapter(transformer) -> PuLIDFlux:
    adapter = create_adapter(transformer)
    adapter.attach(transformer)
    return adapter


@pytest.fixture(scope="module")
def adapters(flux) -> Any:
    return comfyui.import_pack("adapters")


@pytest.fixture(scope="module")
def loaded(adapters, transformer) -> Any:
    return adapters.LoadedAdapter(adapters.wrap_adapter(create_adapter(transformer)), "tiny")


@pytest.fixture(scope="module")
def apply(adapters, loaded) -> Callable[..., Any]:
    """Apply an identity to a model."""

    def apply(model: Any, identity: Any, scale: float = 0.9, **options: Any) -> Any:
        options = adapters.ApplyOptions(scale, **options)
        return adapters.apply_adapter(model, loaded, identity, options)

    return apply


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    """Inputs of a negative row, then of a positive one."""
    generator = torch.Generator().manual_seed(2)
    return {
        "latents": torch.randn(2, 16, HEIGHT, WIDTH, generator=generator),
        "text": torch.randn(2, 7, 24, generator=generator),
        "pooled": torch.randn(2, 20, generator=generator),
        "reference": torch.randn(1, 16, 4, 4, generator=generator),
    }


def pack(latents: Tensor) -> Tensor:
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def image_ids(rows: int, columns: int, first: float = 0.0) -> Tensor:
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return torch.cat([torch.full((len(grid), 1), first), grid], dim=1)


def call_diffusers(
    transformer: Any, inputs: dict[str, Tensor], row: int, has_reference: bool = False
) -> Tensor:
    """Call the transformer for one row, and return its latents."""
    image = pack(inputs["latents"][row : row + 1])
    ids = image_ids(ROWS, COLUMNS)
    if has_reference:
        image = torch.cat([image, pack(inputs["reference"])], dim=1)
        ids = torch.cat([ids, image_ids(2, 2, first=1.0)])
    with torch.no_grad():
        output = transformer(
            image,
            encoder_hidden_states=inputs["text"][row : row + 1],
            pooled_projections=inputs["pooled"][row : row + 1],
            timestep=torch.tensor([SIGMA]),
            img_ids=ids,
            txt_ids=torch.zeros(7, 3),
            guidance=torch.tensor([3.5]),
        ).sample[:, : ROWS * COLUMNS]
    return rearrange(output, "b (h w) (c p q) -> b c (h p) (w q)", h=ROWS, p=2, q=2)


def call_both_rows(transformer: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Call the transformer for the positive row, then for the negative one; negative first."""
    positive = call_diffusers(transformer, inputs, 1, **options)
    return torch.cat([call_diffusers(transformer, inputs, 0, **options), positive])


def call_comfyui(
    model: Any,
    inputs: dict[str, Tensor],
    layout: list[int],
    sigma: float = SIGMA,
    has_reference: bool = False,
    has_pooled: bool = True,
) -> Tensor:
    """Call the transformer with one row per entry of the layout."""
    rows = [1 - group for group in layout]
    options: dict[str, Any] = {"guidance": torch.full((len(rows),), 3.5)}
    if has_pooled:
        options["y"] = inputs["pooled"][rows]
    if has_reference:
        options["ref_latents"] = [inputs["reference"].repeat(len(rows), 1, 1, 1)]
    time = torch.full((len(rows),), sigma)
    return call_network(
        model, layout, sigma, inputs["latents"][rows], time, inputs["text"][rows], **options
    )


def relative_error(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).abs().max() / reference.abs().max())


@pytest.mark.parametrize("has_reference", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_flux_call_equals_diffusers_in_every_layout(
    transformer, flux, adapter, apply, inputs, masked, has_reference, record_property
) -> None:
    mask = LEFT if masked else None
    base = call_both_rows(transformer, inputs, has_reference=has_reference)
    with adapter.use([(anna, mask)], scale=0.9):
        expected = call_both_rows(transformer, inputs, has_reference=has_reference)
    shown = apply(flux, anna, mask=None if mask is None else mask[None])
    errors = []
    for layout in LAYOUTS:
        rows = [1 - group for group in layout]
        ours = call_comfyui(shown, inputs, layout, has_reference=has_reference)
        assert relative_error(expected[rows], base[rows]) > 1e-2
        errors.append(relative_error(ours, expected[rows]))
    record_property("relative_error", max(errors))
    assert max(errors) <= 1e-5, errors


def test_two_people_equal_diffusers(transformer, flux, adapter, apply, inputs) -> None:
    with adapter.use([(anna, LEFT), (ben, 1 - LEFT)], scale=0.9):
        expected = call_both_rows(transformer, inputs)
    one = apply(flux, anna, mask=LEFT[None])
    both = apply(one, ben, mask=1 - LEFT[None])
    assert relative_error(call_comfyui(both, inputs, [1, 0]), expected) <= 1e-5
    with adapter.use([(anna, LEFT)], scale=0.9):
        expected = call_both_rows(transformer, inputs)
    assert relative_error(call_comfyui(one, inputs, [1, 0]), expected) <= 1e-5


def test_every_row_has_the_mask_of_its_image(flux, apply, inputs) -> None:
    """With guidance and a batch of two, ComfyUI's rows are neg0, neg1, pos0, pos1."""
    masks = torch.stack([LEFT, 1 - LEFT])
    latents = torch.randn(2, 16, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))

    def call(mask: Tensor, images: list[int]) -> Tensor:
        rows = [row for row in (0, 1) for _ in images]
        options = {"guidance": torch.full((len(rows),), 3.5), "y": inputs["pooled"][rows]}
        time = torch.full((len(rows),), SIGMA)
        batch = latents[images].repeat(2, 1, 1, 1)
        shown = apply(flux, anna, mask=mask)
        return call_network(shown, [1, 0], SIGMA, batch, time, inputs["text"][rows], **options)

    both = call(masks, [0, 1])
    for image in (0, 1):
        alone = call(masks[image : image + 1], [image])
        assert relative_error(both[[image, 2 + image]], alone) <= 1e-5
        other = call(masks[1 - image : 2 - image], [image])
        assert relative_error(other, alone) > 1e-2


@pytest.mark.parametrize("masked", [False, True])
def test_chroma_equals_hooks_on_its_blocks(
    chroma, adapter, apply, inputs, masked, record_property
) -> None:
    """No diffusers adapter acts in Chroma: here forward hooks call this package's attention."""
    mask = LEFT if masked else None
    shown = apply(chroma, anna, mask=None if mask is None else mask[None])
    network = chroma.model.diffusion_model
    blocks = select_block_keys(len(network.double_blocks), len(network.single_blocks))
    layers = dict(zip(blocks, adapter.layers, strict=True))
    with torch.no_grad():
        tokens = adapter.encode_people([[(anna, None)]])
        negative = adapter.unconditional(anna.id_cond, anna.hidden)[:, None]
        identity = FluxIdentity(
            layers,
            precompute_projections(layers, tokens),
            lambda: precompute_projections(layers, negative),
            0.9,
            stack_masks([[(anna, mask)]]),
        )
    num_text = inputs["text"].shape[1]

    def hook(block: Any, is_negative: bool) -> Any:
        call = FluxCall(
            True,
            identity.keys_values(is_negative),
            regions=identity.resize_masks((ROWS, COLUMNS), 1),
        )

        def add(module: Any, args: Any, output: Any) -> Any:
            if block[0] == "double":
                return identity.add_to(output[0], block, call), output[1]
            text, image = output[:, :num_text], output[:, num_text:]
            return torch.cat([text, identity.add_to(image, block, call)], dim=1)

        return add

    for group in (0, 1):
        plain = call_comfyui(chroma, inputs, [group], has_pooled=False)
        handles = []
        with torch.no_grad():
            for kind, index in blocks:
                module = getattr(network, f"{kind}_blocks")[index]
                handles.append(module.register_forward_hook(hook((kind, index), group == 1)))
            expected = call_comfyui(chroma, inputs, [group], has_pooled=False)
        for handle in handles:
            handle.remove()
        assert relative_error(plain, expected) > 1e-2
        ours = call_comfyui(shown, inputs, [1, 0], has_pooled=False)[[1 - group]]
        error = relative_error(ours, expected)
        record_property("relative_error", error)
        assert error <= 1e-5


def test_identity_acts_between_start_and_end(flux, apply, inputs) -> None:
    shown = apply(flux, anna, start=0.2, end=0.6)
    sigma_of = flux.get_model_object("model_sampling").percent_to_sigma
    acts = []
    for fraction in (0.0, 0.1, 0.2, 0.4, 0.59, 0.6, 0.9):
        arguments = (inputs, [0], sigma_of(fraction))
        base = call_comfyui(flux, *arguments)
        acts.append(not torch.equal(call_comfyui(shown, *arguments), base))
    assert acts == [False, False, True, True, True, False, False]


def test_models_do_not_see_each_other(flux, apply, inputs) -> None:
    conditioning = [[inputs["text"][:1], {"pooled_output": inputs["pooled"][:1]}]]
    latent = torch.zeros(1, 16, HEIGHT, WIDTH)

    def run(model: Any, cfg: float = 1.0) -> Tensor:
        return sample(model, conditioning, conditioning, latent, cfg=cfg, scheduler="simple")

    base = run(flux)
    first, second = apply(flux, anna), apply(flux, ben)
    shown = run(first)
    assert not torch.equal(shown, base)
    assert not torch.equal(run(second), shown)
    assert torch.equal(run(first), shown)
    assert torch.equal(run(flux), base)
    assert torch.equal(run(apply(flux, anna, 0.0)), base)
    assert torch.isfinite(run(first, cfg=2.0)).all()
    assert not flux.model_options["transformer_options"].get("patches_replace")


def test_patch_of_other_pack_still_runs(flux, apply, inputs) -> None:
    calls = []

    def other(args: Any, extra: Any) -> Any:
        calls.append(args["img"].shape)
        return extra["original_block"](args)

    model = flux.clone()
    for kind in ("double_block", "single_block"):
        model.set_model_patch_replace(other, "dit", kind, 0)
    shown = apply(model, anna)
    expected = call_comfyui(apply(flux, anna), inputs, [0])
    assert torch.equal(call_comfyui(shown, inputs, [0]), expected)
    assert len(calls) == 2


def test_reduced_precision(transformer, apply, inputs) -> None:
    """Weights in bfloat16, computed in float32 and in bfloat16."""
    model = comfyui.flux_patcher(transformer)
    model.model.diffusion_model.to(torch.bfloat16)
    shown = apply(model, anna)
    half = {name: value.bfloat16() for name, value in inputs.items()}
    ours = call_comfyui(shown, half, [1, 0]).float()
    base = call_comfyui(model, half, [1, 0]).float()
    assert torch.isfinite(ours).all() and relative_error(ours, base) > 1e-2


def test_unsuitable_models_raise(flux, adapters, loaded, transformer, apply) -> None:
    other = comfyui.flux_patcher(tiny_flux.tiny_transformer(in_channels=64, num_layers=6))
    with pytest.raises(WeightsError, match="another transformer"):
        apply(other, anna)

    class Unknown(torch.nn.Module):
        double_blocks: Any = ()

    model = flux.clone()
    model.add_object_patch("diffusion_model", Unknown())
    with pytest.raises(OptionError, match=r"SDXL, FLUX.*Chroma, Qwen-Image"):
        apply(model, anna)
