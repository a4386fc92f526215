"""Identity attention in one layer and in a U-Net: parity with the reference on seeded weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from openpulid.methods.hooks import SchedulePosition
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.projection import (
    PROJECTIONS,
    append_zero_row,
    attend,
    attend_once,
    zero_token_bias,
)
from openpulid.methods.pulid.sdxl import PuLID, compiling_pays
from openpulid.methods.pulid.sdxl_attention import (
    AttentionOptions,
    IdentityAttention,
    IdentityLayer,
    SDXLCall,
    SDXLInjection,
    create_identity_layers,
    cross_attentions,
    grid_size,
)
from openpulid.methods.pulid.sdxl_layer import add_identities, run_compiled, warn_not_compiled

MODES = {"none": "none", "v1": "ortho", "v2": "ortho_v2"}
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs g++ to compile for a CPU"
)


@pytest.fixture
def compiler() -> Iterator[Any]:
    """Count the graphs that are compiled, and forget them afterwards."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()


@pytest.mark.parametrize("zeros", [0, 8, 20])
@pytest.mark.parametrize("mode", MODES)
def test_layer_matches_reference(golden, mode: str, zeros: int) -> None:
    check_layer(golden, mode, zeros, compiled=False)


@needs_compiler
@pytest.mark.parametrize(("mode", "zeros"), [("v1", 8), ("v2", 20)])
def test_compiled_layer_matches_reference(golden, compiler, mode: str, zeros: int) -> None:
    check_layer(golden, mode, zeros, compiled=True)
    assert compiler() == 1


@torch.no_grad()
def check_layer(golden, mode: str, zeros: int, compiled: bool) -> None:
    attention = golden.fill(
        Attention(query_dim=64, cross_attention_dim=32, heads=4, dim_head=16), "attn2."
    )
    layer = golden.fill(IdentityLayer(64, 32), "attn2.processor.")
    pair = tuple(x[:, None] for x in layer(golden.input("attn.id", 2, 10, 32)))  # (P, J, N, hidden)
    options = AttentionOptions(0.8, projection=MODES[mode], num_zero=zeros, compiled=compiled)
    injection = SDXLInjection(
        {"1": pair}, dict, lambda: False, lambda timestep: SchedulePosition(0.0), options
    )
    expanded = tuple(injection.expand(x, None, 2, 4, torch.device("cpu"), None) for x in pair)
    bias = zero_token_bias(expanded[0], zeros)
    injection.calls[2] = SDXLCall(True, {"1": expanded}, bias, scale=torch.tensor(0.8))
    handles = list(IdentityAttention("1", attention.heads, injection).register(attention))
    assert len(handles) == 2
    out = attention(golden.input("attn.hidden", 2, 36, 64), golden.input("attn.text", 2, 7, 32))
    assert golden.error(f"id_attention.ortho_{mode}.zeros_{zeros}", out) < 1e-4
    assert injection.can_compile


@pytest.fixture(scope="module")
def unet(golden) -> Iterator[UNet2DConditionModel]:
    yield golden.fill(UNet2DConditionModel(**golden.manifest["tiny_sdxl_unet_config"]), "unet.")


@pytest.fixture(scope="module")
def adapter(golden, unet) -> PuLID:
    """Create an adapter with the seeded weights of the reference's attention processors."""
    adapter = PuLID.for_unet(unet, IDEncoder(12, 64, vit_dim=8, hidden_dim=16))
    order = golden.manifest["tiny_sdxl_unet_processor_order"]
    for index, layer in adapter.id_adapter_attn_layers.items():
        golden.fill(layer, order[int(index)] + ".")
    adapter.attach(unet)
    return adapter


def call(golden, unet: UNet2DConditionModel) -> torch.Tensor:
    conditions = {
        "text_embeds": golden.input("unet.pooled", 2, 32),
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]] * 2),
    }
    return unet(
        golden.input("unet.sample", 2, 4, 16, 16),
        501,
        golden.input("unet.text", 2, 9, 64),
        added_cond_kwargs=conditions,
    ).sample


@pytest.mark.parametrize(("mode", "zeros"), [("none", 0), ("v1", 16), ("v2", 8), ("v2", 20)])
@torch.no_grad()
def test_unet_matches_reference(golden, unet, adapter, mode: str, zeros: int) -> None:
    baseline = call(golden, unet)
    assert golden.error("unet.base", baseline) < 1e-4
    with adapter.use_tokens(
        golden.input("unet.id", 2, 10, 64), scale=0.8, projection=MODES[mode], num_zero=zeros
    ):
        out = call(golden, unet)
    assert golden.error(f"unet.id.ortho_{mode}.zeros_{zeros}", out) < 1e-4
    assert torch.equal(call(golden, unet), baseline)


@needs_compiler
@torch.no_grad()
def test_compiled_unet_matches_reference(golden, compiler, unet, adapter) -> None:
    """One graph for each size of layers, shared by all steps and scales."""
    baseline = call(golden, unet)
    tokens = golden.input("unet.id", 2, 10, 64)
    options = {"projection": "ortho_v2", "num_zero": 20, "compiled": True}
    with adapter.use_tokens(tokens, scale=0.8, **options):
        out = call(golden, unet)
    assert golden.error("unet.id.ortho_v2.zeros_20", out) < 1e-4
    graphs = compiler()
    sizes = {layer.inner_dim for layer in cross_attentions(unet).values()}
    assert graphs == len(sizes)
    with adapter.use_tokens(tokens, scale=0.3, **options):
        assert not torch.equal(call(golden, unet), out)
    assert compiler() == graphs
    assert torch.equal(call(golden, unet), baseline)


@needs_compiler
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
@torch.no_grad()
def test_compiled_layer_with_masks_is_the_eager_one(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    query, text = random(2, 36, 64), random(2, 36, 64)
    pair = random(2, 2, 4, 10, 16), random(2, 2, 4, 10, 16)
    regions = torch.rand(2, 2, 36, 1, generator=generator)
    scale = torch.tensor(0.7)
    added = add_identities(query, text, pair, None, regions, 0.7, 4, "ortho_v2")
    inputs = (query.to(dtype), text.to(dtype), tuple(x.to(dtype) for x in pair))
    compiled = run_compiled(*inputs, None, regions, scale, 4, "ortho_v2")
    assert compiled is not None and compiled.dtype == dtype
    torch.testing.assert_close(compiled.float(), added, rtol=tolerance, atol=tolerance)


def test_one_product_gives_both_softmaxes() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 36, 16, generator=generator)
    key, value = torch.randn(2, 2, 4, 10, 16, generator=generator)
    for num_zero in (0, 20):
        padded = append_zero_row(key, num_zero), append_zero_row(value, num_zero)
        bias = zero_token_bias(padded[0], num_zero)
        for projection in PROJECTIONS:
            pairs = zip(
                attend(query, *padded, projection, bias),
                attend_once(query, *padded, projection, bias),
                strict=True,
            )
            for one, other in pairs:
                if one is None:
                    assert other is None and projection != "ortho_v2"
                else:
                    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_identity_acts_without_a_compiler(golden, compiler, unet, adapter, caplog) -> None:
    """As it is, with one warning."""
    tokens = golden.input("unet.id", 2, 10, 64)
    warn_not_compiled.cache_clear()
    missing = {"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}
    is_used = adapter.use_tokens(tokens, 0.8, num_zero=20, compiled=True)
    with torch._inductor.config.patch(missing), is_used:
        out = call(golden, unet)
    with adapter.use_tokens(tokens, 0.8, num_zero=20):
        assert torch.equal(call(golden, unet), out)
    assert golden.error("unet.id.ortho_v2.zeros_20", out) < 1e-4
    assert caplog.text.count("cannot be compiled on this machine") == 1


def test_many_images_are_compiled_on_gpus() -> None:
    gpu = torch.device("cuda")
    assert compiling_pays(gpu, 17) and not compiling_pays(gpu, 16)
    assert not compiling_pays(torch.device("cpu"), 100)


def test_training_is_not_compiled(golden, compiler, unet, adapter) -> None:
    tokens = golden.input("unet.id", 2, 10, 64).requires_grad_()
    with adapter.use_tokens(tokens, 0.8, num_zero=20, compiled=True):
        call(golden, unet).square().mean().backward()
    assert tokens.grad is not None and tokens.grad.abs().max() > 0
    assert compiler() == 0


def test_layer_order_is_published_one(golden, unet) -> None:
    assert list(unet.attn_processors) == golden.manifest["tiny_sdxl_unet_processor_order"]
    sdxl = {
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        full = UNet2DConditionModel(**sdxl)
        layers = {
            f"id_adapter_attn_layers.{k}": list(x.shape)
            for k, x in create_identity_layers(full).state_dict().items()
        }
    assert list(full.attn_processors) == golden.manifest["sdxl_processor_order"]
    published = {
        k: v for k, v in golden.manifest["pulid_v1"].items() if not k.startswith("id_adapter.")
    }
    assert layers == published


def test_grid_size_rounds_up() -> None:
    assert grid_size(12, 12, 36) == (6, 6)
    assert grid_size(13, 21, 4 * 6) == (4, 6)
