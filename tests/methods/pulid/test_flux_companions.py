"""PuLID for FLUX together with other features of diffusers.

LoRA, ControlNet, IP-Adapter, inpainting, Fill, Kontext, caching, offloading and compilation. In
each case the identity acts, the other feature stays active, and the pipeline is restored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import (
    HookRegistry,
    apply_faster_cache,
    apply_first_block_cache,
    apply_mag_cache,
    apply_pyramid_attention_broadcast,
    apply_taylorseer_cache,
)
from torch import Tensor, nn

from openpulid.errors import OptionError
from openpulid.methods.pulid.flux import PuLIDFlux
from tests.support.people import anna, ben, distance
from tests.support.tiny_flux import fresh, run, tiny_pipe
from tests.support.versions import one_compilation_for_all_blocks


def picture(seed: int = 3) -> Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def left_half() -> Tensor:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    return mask


def within(pipe: FluxPipeline, kind: type, **parts: Any) -> Any:
    """Create a pipeline of another kind from the components."""
    index = {
        name: part
        for name, part in pipe.components.items()
        if name not in ("image_encoder", "feature_extractor")
    }
    second = kind(**index, **parts)
    second.set_progress_bar_config(disable=True)
    return second


def check_identity(pipe: Any, **options: Any) -> PuLIDFlux:
    """Check that two identities differ, and that the pipeline is restored bit for bit."""
    baseline = run(pipe, **options)
    adapter = fresh(pipe)
    images = []
    for person in (anna, ben):
        with adapter.use(person):
            images.append(run(pipe, **options))
    assert min(distance(baseline, image) for image in images) > 1e-2 and distance(*images) > 1e-2
    assert np.array_equal(run(pipe, **options), baseline)
    return adapter


def test_lora_stays_active() -> None:
    from peft import LoraConfig

    pipe = tiny_pipe()
    plain = run(pipe)
    torch.manual_seed(1)
    lora = LoraConfig(
        r=2, target_modules=["to_q", "to_v", "to_out.0", "proj_mlp"], init_lora_weights=False
    )
    pipe.transformer.add_adapter(lora, "style")
    assert distance(run(pipe), plain) > 1e-3
    adapter = check_identity(pipe)
    with adapter.use(anna):
        both = run(pipe)
        pipe.transformer.disable_adapters()
        alone = run(pipe)
    assert distance(both, alone) > 1e-3


def test_controlnet_stays_active() -> None:
    base = tiny_pipe()
    torch.manual_seed(1)
    net = FluxControlNetModel.from_transformer(
        base.transformer, 2, 2, attention_head_dim=16, num_attention_heads=2
    )
    for layer in (*net.controlnet_blocks, *net.controlnet_single_blocks, net.controlnet_x_embedder):
        nn.init.normal_(layer.weight, std=0.3)
    pipe = within(base, FluxControlNetPipeline, controlnet=net.eval())
    adapter = check_identity(pipe, control_image=picture())
    with adapter.use(anna):
        images = [
            run(pipe, control_image=picture(), controlnet_conditioning_scale=scale)
            for scale in (0.0, 1.0)
        ]
    assert distance(*images) > 1e-3


def test_ip_adapter_stays_active() -> None:
    pipe = tiny_pipe()
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return 0.5 * torch.randn(shape, generator=generator)

    image = {
        "proj.weight": noise(4 * 24, 12),
        "proj.bias": noise(4 * 24),
        "norm.weight": torch.ones(24),
        "norm.bias": noise(24),
    }
    layers = {}
    for block in range(len(pipe.transformer.transformer_blocks)):
        for name in ("k", "v"):
            layers |= {
                f"{block}.to_{name}_ip.weight": noise(32, 24),
                f"{block}.to_{name}_ip.bias": noise(32),
            }
    weights = {"image_proj": image, "ip_adapter": layers}
    pipe.load_ip_adapter(weights, weight_name="", image_encoder_pretrained_model_name_or_path=None)
    options = {f"{side}ip_adapter_image_embeds": [noise(1, 1, 12)] for side in ("", "negative_")}
    adapter = check_identity(pipe, **options)
    with adapter.use(anna):
        images = []
        for scale in (0.0, 1.0):
            pipe.set_ip_adapter_scale(scale)
            images.append(run(pipe, **options))
    assert distance(*images) > 1e-3


def test_inpainting_keeps_unmasked_area() -> None:
    pipe = within(tiny_pipe(), FluxInpaintPipeline)
    options = {"image": picture(), "mask_image": left_half(), "strength": 0.75}
    adapter = check_identity(pipe, **options)
    baseline = run(pipe, **options).reshape(8, 8, -1)
    with adapter.use(anna):
        changed = run(pipe, **options).reshape(8, 8, -1)
    assert (
        np.array_equal(baseline[:, 4:], changed[:, 4:])
        and distance(baseline[:, :4], changed[:, :4]) > 1e-2
    )


def test_fill_pipeline() -> None:
    """The image and its mask are additional channels of each token."""
    pipe = within(tiny_pipe(in_channels=16 + 16 + 16, out_channels=16), FluxFillPipeline)
    check_identity(pipe, image=picture(), mask_image=left_half())


def test_kontext_changes_only_generated_tokens() -> None:
    """Tokens of the reference image are unchanged after the first block."""
    pipe = within(tiny_pipe(), FluxKontextPipeline)
    options = {"image": picture(), "_auto_resize": False, "max_area": 32 * 32}
    adapter = check_identity(pipe, **options)
    captured: list[Tensor] = []
    for scale in (0.0, 1.0):
        with adapter.use(anna, scale=scale):
            hook = pipe.transformer.transformer_blocks[0].register_forward_hook(
                lambda block, args, out: captured.append(out[1])
            )
            run(pipe, steps=1, **options)
            hook.remove()
    baseline, changed = captured
    assert baseline.shape[1] == 2 * 64
    assert torch.equal(baseline[:, 64:], changed[:, 64:]) and not torch.equal(
        baseline[:, :64], changed[:, :64]
    )


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=10.0),
    "magnitudes": MagCacheConfig(
        threshold=10.0, num_inference_steps=4, retention_ratio=0.25, mag_ratios=[1.0] * 4
    ),
    "expansion": TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, use_lite_mode=True
    ),
    "pyramid": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 900)
    ),
    "faster": FasterCacheConfig(
        is_guidance_distilled=True,
        spatial_attention_timestep_skip_range=(0, 681),
        attention_weight_callback=lambda module: 0.3,
    ),
}
FUNCTIONS = {
    "first block": apply_first_block_cache,
    "magnitudes": apply_mag_cache,
    "expansion": apply_taylorseer_cache,
    "pyramid": apply_pyramid_attention_broadcast,
    "faster": apply_faster_cache,
}


@pytest.mark.parametrize("by_function", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_cached_step_has_identity_once(name: str, by_function: bool) -> None:
    """A cached step repeats a full one, identity included: caching must not weaken or double it."""
    pipe = tiny_pipe(num_single_layers=6)
    adapter = fresh(pipe)
    plain = run(pipe)
    with adapter.use(anna):
        exact = run(pipe)
    config = CACHES[name]
    if hasattr(config, "current_timestep_callback"):
        config = replace(config, current_timestep_callback=lambda: pipe.current_timestep)
    if by_function:
        FUNCTIONS[name](pipe.transformer, config)
        HookRegistry.check_if_exists_or_initialize(
            pipe.transformer
        ).invalidate_child_registries_cache()  # it has run before
    else:
        pipe.transformer.enable_cache(config)
    assert pipe.transformer.is_cache_enabled != by_function
    cached = run(pipe)
    with adapter.use(anna):
        with_identity = run(pipe)
        assert np.array_equal(run(pipe), with_identity)
    assert distance(cached, plain) > 1e-3 and distance(with_identity, exact) < 2 * distance(
        cached, plain
    )
    assert distance(with_identity, cached) > 0.5 * distance(exact, plain)
    assert np.array_equal(run(pipe), cached)
    if not by_function:
        pipe.transformer.disable_cache()
        assert np.array_equal(run(pipe), plain)


def test_cache_without_tolerance_changes_nothing() -> None:
    pipe = tiny_pipe(num_single_layers=6)
    adapter = fresh(pipe)
    plain = run(pipe)
    with adapter.use(anna):
        exact = run(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert np.array_equal(run(pipe), plain)
    with adapter.use(anna):
        assert np.array_equal(run(pipe), exact)


def test_cached_step_ends_with_output_of_first_block() -> None:
    pipe = tiny_pipe(num_single_layers=6)
    pipe.transformer.enable_cache(CACHES["first block"])
    inputs: list[Tensor] = []
    arrived: list[Tensor] = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(
        lambda block, args, output: inputs.append(output[1])
    )
    pipe.transformer.norm_out.register_forward_pre_hook(lambda layer, args: arrived.append(args[0]))
    with fresh(pipe).use(anna):
        run(pipe)
    assert [torch.equal(*pair) for pair in zip(inputs, arrived, strict=True)] == [
        False,
        True,
        True,
        True,
    ]


def test_group_offloading() -> None:
    pipe = tiny_pipe()
    adapter = fresh(pipe)
    with adapter.use(anna):
        expected = run(pipe)
    cpu = torch.device("cpu")
    blocks = {"offload_type": "block_level", "num_blocks_per_group": 2}
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, **blocks)
    assert np.array_equal(run(pipe), run(tiny_pipe()))
    with adapter.use(anna):
        assert np.array_equal(run(pipe), expected)


def test_sequential_offloading() -> None:
    """Weights are on the meta device between calls, as with `enable_sequential_cpu_offload`."""
    from accelerate import cpu_offload

    pipe = tiny_pipe()
    adapter = fresh(pipe)
    baseline = run(pipe)
    with adapter.use(anna):
        expected = run(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"))
    assert all(parameter.is_meta for parameter in pipe.transformer.parameters())
    adapter.attach(pipe)
    with adapter.use(anna):
        assert np.array_equal(run(pipe), expected)
    assert np.array_equal(run(pipe), baseline)


# -- torch.compile: the tracer is what matters here, so nothing is generated --


def check_compiled_images(pipe: Any, compile: Callable[[Any], Any]) -> None:
    """Check that compiled images equal eager ones before, in and after `use`."""
    adapter = fresh(pipe)
    baseline = run(pipe, steps=1)
    with adapter.use(anna):
        expected = run(pipe, steps=1)
    compile(pipe.transformer)
    for _ in range(2):
        assert distance(run(pipe, steps=1), baseline) < 1e-5
        with adapter.use(anna):
            assert distance(run(pipe, steps=1), expected) < 1e-5


@pytest.fixture
def compiler() -> Any:
    yield torch._dynamo.config
    torch.compiler.reset()


@one_compilation_for_all_blocks
def test_compiled_blocks(compiler) -> None:
    """Has more hooked blocks than the compiler's limit of recompilations (8)."""
    pipe = tiny_pipe(num_layers=18, num_single_layers=1)
    check_compiled_images(
        pipe,
        lambda transformer: transformer.compile_repeated_blocks(backend="eager", fullgraph=True),
    )


def test_compiled_transformer_is_refused_without_hook_guards(compiler) -> None:
    """Compiled code ignores new hooks, unless dynamo's hook guards are enabled."""
    pipe = tiny_pipe()
    full = torch.compile(pipe.transformer, backend="eager")
    adapter = fresh(pipe)
    for transformer in (full, pipe.transformer):
        transformer.compile(backend="eager")
        adapter.attach(transformer)
        with (
            pytest.raises(OptionError, match="compile_repeated_blocks"),
            adapter.use(anna, pipe=transformer),
        ):
            pass
        adapter.detach()
    with compiler.patch(skip_nnmodule_hook_guards=False):
        check_compiled_images(tiny_pipe(), lambda transformer: transformer.compile(backend="eager"))
