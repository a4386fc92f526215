"""PuLID for FLUX: parity with the reference on seeded weights, and every guarantee of `use`."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    BriaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.pulid.encoders import IDFormer
from openpulid.methods.pulid.flux import PuLIDFlux
from openpulid.methods.pulid.flux_attention import PerceiverCrossAttention
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.methods.transformer_kinds import identity_blocks
from tests.support.people import anna, ben, distance
from tests.support.people import fresh as fresh_sdxl
from tests.support.tiny_flux import SMALL, fresh, run, tiny_pipe
from tests.support.versions import same_noise_in_every_precision


@torch.no_grad()
def test_attention_matches_reference(golden) -> None:
    layer = golden.fill(PerceiverCrossAttention(), "pulid_ca.0.")
    out = layer(golden.input("ca.id", 1, 32, 2048), golden.input("ca.latents", 1, 48, 3072))
    assert golden.error("perceiver_ca.out", out) < 1e-4


@pytest.fixture(scope="module")
def transformer(golden) -> FluxTransformer2DModel:
    transformer = FluxTransformer2DModel(**golden.manifest["tiny_flux_diffusers_config"])
    transformer.load_state_dict(load_file(golden.folder / "tiny_flux_diffusers.safetensors"))
    return transformer.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def adapter(golden, transformer) -> Iterator[PuLIDFlux]:
    former = IDFormer(**SMALL, output_dim=32, hidden_dim=16)
    adapter = (
        PuLIDFlux.for_transformer(transformer, former, dim_head=16, heads=4)
        .eval()
        .requires_grad_(False)
    )
    for k, layer in enumerate(adapter.pulid_ca):
        golden.fill(layer, f"pulid_ca.{k}.")
    adapter.attach(transformer)
    yield adapter
    adapter.detach()


def call(
    golden,
    transformer: Any,
    x: Tensor | None = None,
    time: float = 0.7,
    guidance: float = 3.5,
    text: str = "",
) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    return transformer(
        golden.input("flux.img", 1, 36, 16) if x is None else x,
        golden.input(f"flux.{text}txt", 1, 8, 40),
        golden.input(f"flux.{text}vec", 1, 24),
        torch.tensor([time]),
        torch.stack([torch.zeros(6, 6), rows, columns], -1).reshape(36, 3),
        torch.zeros(8, 3),
        torch.tensor([guidance]),
        return_dict=False,
    )[0]


@torch.no_grad()
def test_transformer_matches_reference(golden, transformer, adapter) -> None:
    baseline = call(golden, transformer)
    assert golden.error("flux.base", baseline) < 1e-4
    for weight in (1.0, 0.6):
        with adapter.use_tokens(golden.input("flux.id", 1, 32, 32), scale=weight):
            assert golden.error(f"flux.id_weight_{weight}", call(golden, transformer)) < 1e-4
    assert torch.equal(call(golden, transformer), baseline)


def denoise(
    golden, transformer: Any, guidance: float, true_cfg: float = 1.0, cfg_from: int = 0
) -> Tensor:
    """Run the reference's denoising loop."""
    x = golden.input("flux.img", 1, 36, 16)
    for step, (time, following) in enumerate(pairwise(schedule(golden, 4, 36))):
        predicted = call(golden, transformer, x, time, guidance)
        if true_cfg != 1 and step >= cfg_from:
            negative = call(golden, transformer, x, time, guidance, "neg_")
            predicted = negative + true_cfg * (predicted - negative)
        x = x + (following - time) * predicted
    return x


def schedule(golden, steps: int, tokens: int) -> list[float]:
    """Return FLUX.1-dev's schedule: evenly spaced, shifted by the number of image tokens."""
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    even = torch.linspace(1, 0, steps + 1)
    shifted = np.exp(mu) / (np.exp(mu) + (1 / even - 1))
    return shifted.tolist()


@pytest.mark.parametrize("name", ["4x256", "20x4096", "28x2304"])
def test_schedules_match_reference(golden, name: str) -> None:
    steps, tokens = map(int, name.split("x"))
    expected = torch.tensor(golden.manifest["flux_schedules"][name])
    torch.testing.assert_close(
        torch.tensor(schedule(golden, steps, tokens)), expected, atol=1e-6, rtol=1e-5
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True
    )  # as FLUX.1-dev configures it
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    torch.testing.assert_close(scheduler.sigmas, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_denoising_loops_match_reference(golden, transformer, adapter) -> None:
    tokens, unconditional = (
        golden.input("flux.id", 1, 32, 32),
        golden.input("flux.uncond", 1, 32, 32),
    )
    with adapter.use_tokens(tokens, start_step=1):
        assert golden.error("flux.denoise_start1", denoise(golden, transformer, 4.0)) < 1e-4
    with adapter.use_tokens(tokens, scale=0.9, negative=unconditional):
        out = denoise(golden, transformer, 1.0, true_cfg=3.0, cfg_from=1)
    assert golden.error("flux.denoise_true_cfg", out) < 1e-4
    # a pipeline guides from the first step: the adapter disables guidance before the start
    with adapter.use_tokens(tokens, scale=0.9, negative=unconditional, timestep_to_start_cfg=1):
        again = denoise(golden, transformer, 1.0, true_cfg=3.0, cfg_from=0)
    torch.testing.assert_close(again, out, atol=1e-5, rtol=1e-4)


def test_published_names_and_shapes_at_full_size(golden) -> None:
    names = golden.manifest["pulid_flux"]
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
        adapter = PuLIDFlux.for_transformer(transformer, IDFormer())
        state = {name: torch.empty(shape) for name, shape in names.items()}
        loaded = PuLIDFlux.from_state_dict(state, IDFormer())
    for one in (adapter, loaded):
        assert {name: list(value.shape) for name, value in one.state_dict().items()} == names
    loaded.attach(transformer)
    assert (
        identity_blocks(transformer)[9:11] == [("double", 18), ("single", 0)]
        and len(identity_blocks(transformer)) == 20
    )
    with pytest.raises(WeightsError, match="Unexpected key"):
        PuLIDFlux.from_state_dict({**state, "pulid_encoder.more": torch.empty(1)}, IDFormer())


# -- on a tiny pipeline --


@pytest.fixture
def pipe() -> FluxPipeline:
    return tiny_pipe()


def test_identity_acts_and_pipeline_is_restored(pipe) -> None:
    baseline = run(pipe)
    adapter = fresh(pipe)
    images = []
    for person in (anna, ben):
        with adapter.use(person):
            images.append(run(pipe))
    assert min(distance(baseline, x) for x in images) > 1e-3 and distance(*images) > 1e-3
    with pytest.raises(RuntimeError, match="inside"), adapter.use(anna):
        raise RuntimeError("inside")
    assert np.array_equal(run(pipe), baseline)
    blocks = [
        *pipe.transformer.transformer_blocks,
        *pipe.transformer.single_transformer_blocks,
        pipe.transformer,
    ]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)
    adapter.detach(pipe)
    with pytest.raises(OptionError, match="is not attached to this pipeline"), adapter.use(anna):
        pass


def test_untrained_adapter_changes_nothing(pipe) -> None:
    adapter = PuLIDFlux.for_transformer(
        pipe.transformer, IDFormer(**SMALL, output_dim=16, hidden_dim=16), dim_head=8, heads=2
    )
    adapter.attach(pipe)
    baseline = run(pipe)
    with adapter.use(anna):
        assert np.array_equal(run(pipe), baseline)


def test_start_step_and_fractions_agree(pipe) -> None:
    adapter = fresh(pipe)
    images = {}
    variants = {
        "all": {},
        "fraction": {"start": 0.5},
        "step": {"start_step": 2},
        "end": {"end": 0.5},
        "never": {"start_step": 4},
        "off": {"scale": 0},
    }
    for name, options in variants.items():
        with adapter.use(anna, **options):
            images[name] = run(pipe)
    assert np.array_equal(images["fraction"], images["step"]) and np.array_equal(
        images["never"], images["off"]
    )
    assert len({images[name].tobytes() for name in ("all", "step", "end", "never")}) == 4
    with adapter.use(anna, start_step=2):  # two runs while it is open
        assert np.array_equal(run(pipe), images["step"]) and np.array_equal(
            run(pipe), images["step"]
        )
    with pytest.raises(OptionError, match="fractions"), adapter.use(anna, start=1.5):
        pass


def test_steps_with_equal_rounded_time_are_counted(pipe) -> None:
    """A steep bfloat16 schedule, as of large images: no step is mistaken for a negative call."""
    pipe.to(torch.bfloat16)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=5.0, max_shift=5.0
    )
    adapter, times = fresh(pipe), []
    note = pipe.transformer.register_forward_pre_hook(
        lambda *call: times.append(float(call[-1]["timestep"])), with_kwargs=True
    )
    plain = run(pipe, steps=8)
    note.remove()
    assert len(set(times)) < len(times) == 8
    with adapter.use(anna):
        images = run(pipe, steps=8)
    tokens = adapter.encode(anna.id_cond, anna.hidden).detach()
    with adapter.use_tokens(tokens, negative=tokens):  # both calls have the same tokens
        assert distance(run(pipe, steps=8), images) < 1e-3
    with adapter.use(anna, start_step=7):  # the last
        assert distance(run(pipe, steps=8), plain) > 1e-2
    with adapter.use(anna, start_step=4):
        late = run(pipe, steps=8)
    with adapter.use(anna, start=0.5):
        assert np.array_equal(run(pipe, steps=8), late)


def test_negative_prompt_has_unconditional_tokens(pipe) -> None:
    adapter = fresh(pipe)
    captured = []
    unconditional = adapter.unconditional(anna.id_cond, anna.hidden)
    tokens = adapter.encode(anna.id_cond, anna.hidden)
    with torch.no_grad(), adapter.use(anna):
        images = run(pipe, negative=True)
    with torch.no_grad(), adapter.use_tokens(tokens, negative=unconditional):
        assert distance(run(pipe, negative=True), images) < 1e-5
    with (
        torch.no_grad(),
        adapter.use_tokens(tokens, negative=tokens),
    ):  # the same identity on both sides gives another image
        assert distance(run(pipe, negative=True), images) > 1e-3
    for first in (0, 2, 4):
        with adapter.use(anna, timestep_to_start_cfg=first):
            captured.append(run(pipe, negative=True))
    assert np.array_equal(captured[0], images) and distance(captured[0], captured[1]) > 1e-4
    with adapter.use(anna):
        assert distance(run(pipe), captured[2]) < 1e-5


@pytest.mark.parametrize("negative", [False, True])
def test_batches_match_single_images(pipe, negative: bool) -> None:
    """Also with a negative prompt, whose unconditional tokens are shared by all images."""
    adapter = fresh(pipe)
    with adapter.use([anna, ben]):
        both = run(pipe, count=2, negative=negative)
    for index, one in enumerate((anna, ben)):
        with adapter.use([one, one]):
            twice = run(pipe, count=2, negative=negative)
        apart = [distance(*pair) for pair in zip(both, twice, strict=True)]
        assert apart[index] < 1e-5 and apart[1 - index] > 1e-3
    with pytest.raises(OptionError, match="do not fit"), adapter.use([anna, ben]):
        run(pipe, count=3, negative=negative)


@pytest.mark.parametrize("negative", [False, True])
def test_images_of_one_prompt_are_consecutive(pipe, negative: bool) -> None:
    """The first prompt has two people with masks, the second has one."""
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    adapter, pair = fresh(pipe), [(anna, left), (ben, 1 - left)]
    with adapter.use([pair, [(anna, None)]]):
        four = run(pipe, count=4, negative=negative)
    for people, rows in (([pair, pair], slice(0, 2)), ([[(anna, None)]] * 2, slice(2, 4))):
        with adapter.use(people):
            same = run(pipe, count=4, negative=negative)
        apart = [distance(*both) for both in zip(four, same, strict=True)]
        remaining = set(range(4)) - set(range(*rows.indices(4)))
        assert max(apart[rows]) < 1e-5 and min(apart[k] for k in remaining) > 1e-3


def test_masks_limit_identities_to_regions(pipe) -> None:
    """After a hooked block, tokens outside the mask are unchanged."""
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    adapter = fresh(pipe)
    with adapter.use(anna):
        full = run(pipe)
    with adapter.use([(anna, torch.ones(8, 8))]):
        assert distance(run(pipe), full) < 1e-5
    with adapter.use([(anna, left), (ben, 1 - left)]):
        pair = run(pipe)
    with adapter.use([(ben, 1 - left), (anna, left)]):
        assert distance(run(pipe), pair) < 1e-5
    with adapter.use([(anna, 1 - left), (ben, left)]):
        assert distance(run(pipe), pair) > 1e-3
    first, captured = pipe.transformer.transformer_blocks[0], []
    for scale in (0.0, 1.0):
        with adapter.use([(anna, left)], scale=scale):
            hook = first.register_forward_hook(
                lambda block, args, output: captured.append(output[1].reshape(8, 8, -1))
            )
            run(pipe, steps=1)
            hook.remove()
    assert torch.equal(captured[0][:, 4:], captured[1][:, 4:]) and not torch.equal(
        captured[0][:, :4], captured[1][:, :4]
    )


def test_unconditional_tokens_act_in_all_regions(pipe) -> None:
    """After the first block, tokens outside all masks are unchanged in the negative call."""
    left, top = torch.zeros(8, 8), torch.zeros(8, 8)
    left[:, :4], top[:4] = 1, 1
    adapter, first = fresh(pipe), pipe.transformer.transformer_blocks[0]

    def negative(people: Any, scale: float = 1.0) -> Tensor:
        captured: list[Tensor] = []
        with adapter.use(people, scale=scale):
            hook = first.register_forward_hook(
                lambda block, args, output: captured.append(output[1].reshape(8, 8, -1))
            )
            run(pipe, negative=True, steps=1)
            hook.remove()
        assert len(captured) == 2
        return captured[1]

    unconditional, baseline = negative(anna), negative(anna, scale=0.0)
    torch.testing.assert_close(negative([(anna, left), (ben, 1 - left)]), unconditional)
    above = negative([(anna, left * top), (ben, (1 - left) * top)])
    torch.testing.assert_close(above[:4], unconditional[:4])
    assert torch.equal(above[4:], baseline[4:]) and not torch.equal(unconditional[4:], baseline[4:])


def test_masks_fit_wide_image_with_reference_tokens(golden, transformer, adapter) -> None:
    """4 x 9 generated tokens, followed by a reference of 6 x 2 with more rows, as in Kontext."""
    mask = torch.zeros(8, 18)
    mask[:4, :8] = 1
    inside = torch.zeros(4, 9, dtype=torch.bool)
    inside[:2, :4] = True
    generated = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(9.0))
    reference = torch.cartesian_prod(torch.ones(1), torch.arange(6.0), torch.arange(2.0))
    image = torch.cat([golden.input("flux.img", 1, 36, 16), torch.ones(1, 12, 16)], 1)
    text = golden.input("flux.txt", 1, 8, 40), golden.input("flux.vec", 1, 24)
    captured: list[Tensor] = []
    first = transformer.transformer_blocks[0]
    for scale in (0.0, 1.0):
        with torch.no_grad(), adapter.use([(anna, mask)], scale=scale):
            hook = first.register_forward_hook(
                lambda block, args, output: captured.append(output[1][0])
            )
            ids = torch.cat([generated, reference]), torch.zeros(8, 3)
            transformer(image, *text, torch.tensor([0.7]), *ids, torch.tensor([3.5]))
            hook.remove()
    changed = (captured[0] != captured[1]).any(-1)
    assert torch.equal(changed, torch.cat([inside.flatten(), torch.zeros(12, dtype=torch.bool)]))


def test_image_to_image_and_references(pipe) -> None:
    picture = FluxImg2ImgPipeline(
        **{
            k: v
            for k, v in pipe.components.items()
            if k not in ("image_encoder", "feature_extractor")
        }
    )
    picture.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    baseline = run(picture, image=image, strength=0.75)
    adapter = fresh(picture)
    images = []
    for options in ({}, {"start_step": 1}, {"start": 0.9}):
        with adapter.use(anna, **options):
            images.append(run(picture, image=image, strength=0.75))
    assert distance(images[0], baseline) > 1e-3 and distance(images[1], images[0]) > 1e-4
    assert np.array_equal(run(picture, image=image, strength=0.75), baseline)


def test_reference_tokens_are_unchanged(golden, transformer, adapter) -> None:
    """Reference tokens follow the generated ones, as in Kontext, and get no identity."""
    captured: list[Tensor] = []
    first = transformer.transformer_blocks[0]
    ids = torch.cat([torch.zeros(36, 3), torch.ones(10, 3)])
    image = torch.cat([golden.input("flux.img", 1, 36, 16), torch.ones(1, 10, 16)], 1)
    text = golden.input("flux.txt", 1, 8, 40), golden.input("flux.vec", 1, 24)
    for scale in (0.0, 1.0):
        with torch.no_grad(), adapter.use_tokens(golden.input("flux.id", 1, 32, 32), scale=scale):
            hook = first.register_forward_hook(
                lambda block, args, output: captured.append(output[1])
            )
            transformer(
                image, *text, torch.tensor([0.7]), ids, torch.zeros(8, 3), torch.tensor([3.5])
            )
            hook.remove()
    assert torch.equal(captured[0][:, 36:], captured[1][:, 36:]) and not torch.equal(
        captured[0][:, :36], captured[1][:, :36]
    )


def inputs() -> tuple[Tensor, ...]:
    """Return the arguments of a call of the tiny transformer, 4 x 4 tokens."""
    inputs = (
        torch.randn(1, 16, 16),
        torch.randn(1, 7, 24),
        torch.randn(1, 20),
        torch.tensor([0.5]),
    )
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    return *inputs, grid, torch.zeros(7, 3), torch.tensor([3.5])


def test_gradients_reach_the_adapter_through_checkpointed_blocks(pipe) -> None:
    adapter = fresh(pipe).requires_grad_(True)
    transformer = pipe.transformer.requires_grad_(False)
    arguments, gradients = inputs(), []
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        else:
            transformer.disable_gradient_checkpointing()
        transformer.train(checkpointing)
        adapter.zero_grad()
        with adapter.use_tokens(adapter.encode(anna.id_cond, anna.hidden)):
            out = transformer(*arguments, return_dict=False)[0]
            out.square().sum().backward()
        gradients.append([p.grad.clone() for p in adapter.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(adapter.parameters()))
    for one, second in zip(*gradients, strict=True):
        torch.testing.assert_close(one, second)
    assert all(p.grad is None for p in transformer.parameters())


def test_negative_call_with_gradient_checkpointing_raises(pipe) -> None:
    """Blocks of the positive call, recomputed for backward, would use the negative tokens."""
    adapter, arguments = fresh(pipe), inputs()
    tokens = adapter.encode(anna.id_cond, anna.hidden)

    def calls(*graded: bool) -> None:
        with adapter.use_tokens(tokens, negative=tokens):
            for gradient in graded:
                with torch.set_grad_enabled(gradient):
                    pipe.transformer(*arguments)

    pipe.transformer.enable_gradient_checkpointing()
    for graded in ((True, True), (True, False), (False, True)):
        with pytest.raises(
            OptionError, match="negative prompt cannot be combined with gradient checkpointing"
        ):
            calls(*graded)
    calls(False, False), calls(True)
    pipe.transformer.disable_gradient_checkpointing()
    calls(True, True)


def test_pyramid_attention_broadcast(pipe) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    adapter = fresh(pipe)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: 500,
        spatial_attention_timestep_skip_range=(0, 1000),
    )
    pipe.transformer.enable_cache(config)
    without = run(pipe)
    with adapter.use(anna):
        assert distance(run(pipe), without) > 1e-3
    pipe.transformer.disable_cache()


def test_other_transformers_raise(pipe, adapter) -> None:
    with pytest.raises(WeightsError, match="another transformer"):
        adapter.attach(pipe)
    with pytest.raises(OptionError, match="no FLUX transformer"):
        fresh(pipe).attach(nn.Linear(1, 1))
    other = BriaTransformer2DModel(  # its blocks have the same names
        in_channels=16,
        num_layers=3,
        num_single_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )
    assert isinstance(other.single_transformer_blocks, nn.ModuleList)
    with pytest.raises(OptionError, match="BriaTransformer2DModel has no FLUX transformer"):
        fresh(pipe).attach(other)


def test_variant_selects_file(pipe, tmp_path) -> None:
    """A smaller adapter is located by the published name, and rejected by its shapes."""
    former = IDFormer(**SMALL, output_dim=16, hidden_dim=16)
    adapter = PuLIDFlux.for_transformer(pipe.transformer, former, dim_head=128, heads=1)
    save_file(adapter.state_dict(), tmp_path / "pulid_flux_v0.9.0.safetensors")
    with pytest.raises(WeightsError, match="size mismatch"):
        PuLID.from_pretrained(tmp_path, variant="flux-v0.9.0")
    with pytest.raises(WeightsError, match=r"pulid_flux_v0\.9\.1\.safetensors does not exist"):
        PuLID.from_pretrained(tmp_path, variant="flux-v0.9.1")


def test_adapter_of_other_family_raises(pipe, tiny_pipeline) -> None:
    sdxl = tiny_pipeline()
    ours, theirs = fresh(pipe), fresh_sdxl(sdxl)
    for target in (sdxl, sdxl.unet):
        with pytest.raises(
            OptionError, match=r"has no FLUX transformer; .* use an adapter for SDXL\.$"
        ):
            ours.attach(target)
    for target in (pipe, pipe.transformer):
        with pytest.raises(OptionError, match=r"has no U-Net; .* use an adapter for FLUX\.$"):
            theirs.attach(target)


@same_noise_in_every_precision
@pytest.mark.parametrize("half", ["pipeline", "adapter"])
def test_pipeline_or_adapter_in_bf16(pipe, half: str) -> None:
    adapter = fresh(pipe)
    with adapter.use(anna):
        exact = run(pipe)
    (pipe if half == "pipeline" else adapter).to(dtype=torch.bfloat16)
    baseline = run(pipe)
    with adapter.use(anna):
        assert distance(run(pipe), exact) < 0.1 < distance(baseline, exact)


def test_two_pipelines_in_two_threads_do_not_mix() -> None:
    pairs = []
    for person in (anna, ben):
        pipe = tiny_pipe()
        adapter = fresh(pipe)
        with adapter.use(person, start_step=1, timestep_to_start_cfg=2):
            pairs.append((pipe, adapter, person, run(pipe, negative=True)))

    def often(pair: Any) -> bool:
        pipe, adapter, person, expected = pair
        for _ in range(3):
            with adapter.use(person, start_step=1, timestep_to_start_cfg=2):
                if not np.array_equal(run(pipe, negative=True), expected):
                    return False
        return True

    assert not np.array_equal(pairs[0][-1], pairs[1][-1])
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(often, pairs))
