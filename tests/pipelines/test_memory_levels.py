"""Memory levels: predictions, and the same images at every level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from openpulid.errors import OptionError
from openpulid.pipelines.memory_levels import (
    FLUX_LEVELS,
    INFUSENET_LEVELS,
    LEVELS,
    SDXL_LEVELS,
    find_level,
    place_pipeline,
    store_in_fp8,
    stream_pipeline,
)
from openpulid.pipelines.memory_prediction import (
    GIB,
    infiniteyou_sizes,
    predict_memory,
    sdxl_sizes,
    weight_bytes,
    weight_sizes,
)
from tests.support import people, tiny_sdxl
from tests.support.people import anna, ben
from tests.support.tiny_flux import fresh, run, tiny_pipe, tiny_transformer

CPU = torch.device("cpu")
SDXL_SIZE = (1024, 1024)


def peak(name: str, *args: Any, **options: Any) -> int:
    return max(use.total for use in predict_memory(name, *args, **options))


def test_weights_are_counted_exactly() -> None:
    steps = {need.phase: need.parts for need in predict_memory("full")}["steps"]
    assert steps["transformer"] == 2 * 11_901_408_320  # FLUX.1-dev's parameters
    assert steps["text encoders"] / GIB == pytest.approx(9.1, abs=0.2)
    assert steps["adapter"] == 2 * 571_033_600
    # keys and values of 32 tokens, folded into the projections; those of nobody, too
    assert steps["identity"] == 2 * (20 * 2 * 2 * (16 * 32 * 3072))
    assert 30 < sum(steps.values()) / GIB < 40


def test_sdxl_is_counted_exactly() -> None:
    sizes = sdxl_sizes()
    assert sizes["U-Net"] == 2 * 2_567_463_684  # the published parameters
    assert sizes["text"] == 2 * (123_060_480 + 694_659_840)
    assert sizes["vae"] == 4 * 83_653_863
    # 70 layers for keys and values, ten of 640 and sixty of 1280 channels, and the encoder
    layers = 2 * 2 * 2048 * (10 * 640 + 60 * 1280)
    assert sizes["adapter"] - layers == pytest.approx(606e6, rel=0.01)
    # keys and values of 32 tokens; those of nobody, too
    assert sizes["identity"] == 2 * (4 + 2) * 2 * 32 * (10 * 640 + 60 * 1280)
    assert sizes["U-Net unit"] == 2 * 1280 * (2560 * 9 + 1)  # the largest convolution
    assert 0.5 < sizes["U-Net in fp8"] / sizes["U-Net"] < 0.505


def test_step_of_sdxl_takes_what_was_measured() -> None:
    """On an H200, without encoders and face models, the adapter in bfloat16, its encoder tiny."""
    sizes = sdxl_sizes()
    (steps,) = (use.parts for use in predict_memory("12gb", *SDXL_SIZE, family="sdxl")[1:2])
    layers = 2 * 2 * 2048 * (10 * 640 + 60 * 1280)
    predicted = sizes["U-Net"] + sizes["vae"] / 2 + layers + steps["activations"]
    measured = 6.03 * GIB  # benchmarks/gpu-h200.md: batch 2, guided, base
    assert 0.95 * measured < predicted < measured


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_each_level_fits_its_name(family: Any) -> None:
    for name in LEVELS[family]:
        if name == "full":
            continue
        limit = 0.95e9 * int(name.removesuffix("gb"))
        for size in ((896, 1152), (1024, 1024)):
            assert peak(name, *size, 512, family) < limit
        if family == "sdxl":
            assert peak(name, *SDXL_SIZE, family="sdxl", num_controls=1) < limit


def test_controlnet_is_kept_as_the_network() -> None:
    for family, full in (("sdxl", 2.33), ("flux", 3.99)):
        added = {
            name: peak(name, *SDXL_SIZE, family=family, num_controls=1)
            - peak(name, *SDXL_SIZE, family=family)
            for name in LEVELS[family]
        }
        assert added["full"] / GIB == pytest.approx(full, abs=0.01)
        for name, level in LEVELS[family].items():
            if level.network == "fp8":
                assert 0.5 < added[name] / added["full"] < 0.52
            elif level.network == "resident":
                assert added[name] == added["full"]
            else:
                assert added[name] < 0.4 * added["full"]


def test_fp8_weights_are_counted_as_stored() -> None:
    """The modulation is stored in 8 bits, although diffusers calls it a norm."""
    transformer = tiny_pipe().transformer.bfloat16()
    with torch.device("meta"):
        counted = tiny_transformer().bfloat16()
    for one in (transformer, counted):
        store_in_fp8(one)
    assert weight_bytes(counted) == sum(
        value.numel() * value.element_size() for value in transformer.state_dict().values()
    )
    for name, value in transformer.named_parameters():
        kept = name.startswith(("norm_out.", "proj_out.")) or (
            value.ndim == 1 and not name.endswith("bias")
        )
        assert value.element_size() == 1 + kept, name
    weights = weight_sizes()
    assert 0.5 < weights["transformer in fp8"] / weights["transformer"] < 0.505
    assert {need.phase: need.parts for need in predict_memory("16gb")}["steps"][
        "transformer"
    ] == weights["transformer in fp8"]


def test_lora_keeps_its_dtype_in_fp8() -> None:
    from peft import LoraConfig

    pipe = tiny_pipe()
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["to_q", "norm1.linear"], init_lora_weights=False)
    pipe.transformer.add_adapter(lora, "style")
    plain = run(pipe)
    place_pipeline(pipe, FLUX_LEVELS["24gb"], CPU)
    sizes = {
        ("lora_" in name, part.weight.element_size())
        for name, part in pipe.transformer.transformer_blocks.named_modules()
        if isinstance(part, nn.Linear)
    }
    assert sizes == {(True, 4), (False, 1)}
    assert abs(run(pipe) - plain).max() < 0.5 * abs(plain).max()


def test_decoding_uses_the_predicted_tile_size() -> None:
    """The autoencoder's own tile is as large as the pictures it was trained on."""
    pipe, sizes = tiny_pipe(), []
    place_pipeline(pipe, FLUX_LEVELS["16gb"], CPU)
    vae = pipe.vae  # two pixels on a side for each of its latents, where FLUX's has eight
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (512, 256)
    vae.decoder.register_forward_pre_hook(
        lambda decoder, args: sizes.append(tuple(args[0].shape[-2:]))
    )
    with torch.no_grad():
        vae.decode(torch.zeros(1, 4, 257, 4))
    assert sizes == [(256, 4), (65, 4)]
    decoded = [
        {need.phase: need.parts for need in predict_memory("16gb", side, side)}["decode"]
        for side in (512, 1024)
    ]
    assert decoded[0] == decoded[1]


@pytest.mark.parametrize("family", ["sdxl", "flux", "chroma", "flux2"])
def test_lower_levels_need_less_memory(family: Any) -> None:
    peaks = [peak(name, family=family) for name in LEVELS[family]]
    assert peaks == sorted(peaks, reverse=True)
    small, large = (peak("12gb", side, side, family=family) for side in (512, 2048))
    assert large > small


def test_names_of_a_family_are_said() -> None:
    with pytest.raises(OptionError, match="choose one of full, 24gb, 16gb, 12gb"):
        find_level("flux", "8gb")
    with pytest.raises(OptionError, match="choose one of full, 12gb, 8gb, 6gb"):
        find_level("sdxl", "16gb")


def test_streamed_parts_are_counted_per_block() -> None:
    """One block computes while the next one loads; the autoencoder stays on the device."""
    weights = weight_sizes()
    phases = {need.phase: need.parts for need in predict_memory("12gb")}
    streamed = 2 * weights["transformer unit"] + weights["transformer outside units"]
    assert phases["steps"]["transformer"] == streamed
    assert {parts["autoencoder"] for parts in phases.values()} == {weights["vae"]}


def test_infusenet_fits_next_to_the_transformer() -> None:
    sizes = infiniteyou_sizes()
    # the published files in float32: two parts of InfuseNet, and the projection
    assert sizes["InfuseNet"] == pytest.approx((9_982_278_752 + 1_964_235_168) / 2, rel=2e-2)
    assert sizes["projection"] == pytest.approx(338e6 / 2, rel=2e-3)
    peaks = {}
    for name in FLUX_LEVELS:
        pulid, infusenet = (
            {use.phase: use for use in predict_memory(name, method=method)}
            for method in ("pulid", "infiniteyou-sim")
        )
        peaks[name] = max(use.total for use in infusenet.values())
        assert infusenet["steps"].parts["transformer"] == pulid["steps"].parts["transformer"]
    assert INFUSENET_LEVELS.keys() == FLUX_LEVELS.keys()
    assert 40e9 < peaks["full"] < 43e9  # the authors report 43 GB
    for name, limit in (("24gb", 24e9), ("16gb", 16e9), ("12gb", 12e9)):
        assert peaks[name] < 0.95 * limit


def test_streaming_gives_the_same_image() -> None:
    """As on an accelerator, but for its streams, with the CPU at both ends."""
    pipe = tiny_pipe()
    adapter = fresh(pipe)
    words = {
        "prompt": "portrait of a person",
        "height": 32,
        "width": 32,
        "num_inference_steps": 2,
        "max_sequence_length": 10,
    }

    def image() -> bytes:
        return pipe(**words, generator=torch.Generator().manual_seed(0)).images[0].tobytes()

    before = image()
    with adapter.use(anna):
        shown = image()
    stream_pipeline(pipe, CPU)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    groups = [block._diffusers_hook.get_hook("group_offloading").group.modules for block in blocks]
    assert groups == [[block] for block in blocks]
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        assert any(hasattr(part, "_diffusers_hook") for part in encoder.modules())
    with adapter.use(anna):
        assert image() == shown != before
    assert image() == before


@pytest.mark.parametrize("name", FLUX_LEVELS)
def test_identity_acts_at_every_level(name: str) -> None:
    pipe = tiny_pipe()
    adapter = fresh(pipe)
    plain = run(pipe)
    place_pipeline(pipe, FLUX_LEVELS[name], CPU)
    before = run(pipe)
    assert (
        abs(before - plain).max()
        < (0.5 if FLUX_LEVELS[name].network == "fp8" else 1e-6) * abs(plain).max()
    )
    images = []
    for person in (anna, ben):
        with adapter.use(person):
            images.append(run(pipe))
    assert abs(images[0] - images[1]).max() > 1e-3 and abs(images[0] - before).max() > 1e-3
    assert (run(pipe) == before).all()


def sdxl_pipe() -> Any:
    pipe = tiny_sdxl.pipe()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_sdxl(pipe: Any) -> np.ndarray:
    return people.run(pipe, height=16, width=16, guidance=3.0, negative_prompt="noir")


@pytest.mark.parametrize("name", SDXL_LEVELS)
def test_identity_acts_at_every_level_of_sdxl(name: str) -> None:
    """Exactly as at `full`; in 8 bits with a relative error of .05 of the image."""
    images = []
    for level in (SDXL_LEVELS["full"], SDXL_LEVELS[name]):
        pipe = sdxl_pipe()
        adapter = people.fresh(pipe, encoder=people.IDEncoder(12, 32, vit_dim=8, hidden_dim=16))
        adapter.attach(pipe)
        place_pipeline(pipe, level, CPU)
        before = run_sdxl(pipe)
        shown = []
        for person in (anna, ben):
            with adapter.use(person):
                shown.append(run_sdxl(pipe))
        assert (run_sdxl(pipe) == before).all()
        images.append([before, *shown])
    full, placed = images
    effect = np.linalg.norm(full[1] - full[0])
    assert effect > 0.05 * np.linalg.norm(full[0]) and abs(full[1] - full[2]).max() > 1e-2
    for one, other in zip(full, placed, strict=True):
        if SDXL_LEVELS[name].network == "fp8":
            assert 0 < np.linalg.norm(one - other) < 0.05 * np.linalg.norm(one)
        else:
            assert (one == other).all()
    change = (full[1] - full[0]) - (placed[1] - placed[0])
    assert np.linalg.norm(change) < 0.5 * effect


def test_fp8_unet_keeps_its_ends() -> None:
    unet = sdxl_pipe().unet
    store_in_fp8(unet)
    ends = ("conv_in", "conv_out", "time_embedding", "add_embedding")
    for name, layer in unet.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            assert layer.weight.element_size() == (4 if name.startswith(ends) else 1), name
        elif isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
            assert layer.weight.element_size() == 4
    assert unet.dtype == torch.float32  # what it computes in


def test_streaming_gives_the_same_image_on_sdxl() -> None:
    """As on an accelerator, but for its streams, with the CPU at both ends."""
    pipe = sdxl_pipe()
    adapter = people.fresh(pipe, encoder=people.IDEncoder(12, 32, vit_dim=8, hidden_dim=16))
    adapter.attach(pipe)
    before = run_sdxl(pipe)
    with adapter.use(anna):
        shown = run_sdxl(pipe)
    stream_pipeline(pipe, CPU)
    for network in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        layers = [x for x in network.modules() if isinstance(x, nn.Linear)]
        assert all(x._diffusers_hook.get_hook("group_offloading") for x in layers)
    with adapter.use(anna):
        assert (run_sdxl(pipe) == shown).all()
    assert (run_sdxl(pipe) == before).all() and abs(before - shown).max() > 1e-2
