"""Memory levels of FLUX: predictions, and the same images at every level."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from openpulid.errors import OptionError
from openpulid.pipelines.flux_memory import (
    GIB,
    INFUSENET_LEVELS,
    LEVELS,
    _stream,
    find_level,
    infiniteyou_sizes,
    place_pipeline,
    predict_memory,
    store_in_fp8,
    weight_bytes,
    weight_sizes,
)
from tests.support.people import anna, ben
from tests.support.tiny_flux import fresh, run, tiny_pipe, tiny_transformer


def test_weights_are_counted_exactly() -> None:
    steps = {need.phase: need.parts for need in predict_memory("full")}["steps"]
    assert steps["transformer"] == 2 * 11_901_408_320  # FLUX.1-dev's parameters
    assert steps["text encoders"] / GIB == pytest.approx(9.1, abs=0.2)
    assert steps["adapter"] == 2 * 571_033_600
    # keys and values of 32 tokens, folded into the projections; those of nobody, too
    assert steps["identity"] == 2 * (20 * 2 * 2 * (16 * 32 * 3072))
    assert 30 < sum(steps.values()) / GIB < 40


@pytest.mark.parametrize(("name", "limit"), [("24gb", 24), ("16gb", 16), ("12gb", 12)])
def test_each_level_fits_its_name(name: str, limit: int) -> None:
    for size in ((896, 1152), (1024, 1024)):
        assert (
            max(need.total for need in predict_memory(name, *size, max_sequence_length=512))
            < 0.95 * limit * 1e9
        )


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
    place_pipeline(pipe, "24gb", torch.device("cpu"))
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
    place_pipeline(pipe, "16gb", torch.device("cpu"))
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


def test_lower_levels_need_less_memory() -> None:
    peaks = [max(need.total for need in predict_memory(name)) for name in LEVELS]
    assert peaks == sorted(peaks, reverse=True)
    small, large = (
        max(need.total for need in predict_memory("12gb", side, side)) for side in (512, 2048)
    )
    assert large > small
    with pytest.raises(OptionError, match="24gb, 16gb, 12gb"):
        find_level("8gb")


def test_streamed_parts_are_counted_per_block() -> None:
    """One block computes while the next one loads; the autoencoder stays on the device."""
    weights = weight_sizes()
    phases = {need.phase: need.parts for need in predict_memory("12gb")}
    streamed = 2 * weights["transformer block"] + weights["transformer outside blocks"]
    assert phases["steps"]["transformer"] == streamed
    assert {parts["autoencoder"] for parts in phases.values()} == {weights["vae"]}


def test_infusenet_fits_next_to_the_transformer() -> None:
    sizes = infiniteyou_sizes()
    # the published files in float32: two parts of InfuseNet, and the projection
    assert sizes["InfuseNet"] == pytest.approx((9_982_278_752 + 1_964_235_168) / 2, rel=2e-2)
    assert sizes["projection"] == pytest.approx(338e6 / 2, rel=2e-3)
    peaks = {}
    for name in LEVELS:
        pulid, infusenet = (
            {use.phase: use for use in predict_memory(name, method=method)}
            for method in ("pulid", "infiniteyou-sim")
        )
        peaks[name] = max(use.total for use in infusenet.values())
        assert infusenet["steps"].parts["transformer"] == pulid["steps"].parts["transformer"]
    assert INFUSENET_LEVELS.keys() == LEVELS.keys()
    assert 40e9 < peaks["full"] < 43e9  # the authors report 43 GB
    for name, limit in (("24gb", 24e9), ("16gb", 16e9), ("12gb", 12e9)):
        assert peaks[name] < 0.95 * limit


def test_streaming_gives_the_same_image() -> None:
    """As on an accelerator, but for its streams, with the CPU at both ends."""
    pipe, cpu = tiny_pipe(), torch.device("cpu")
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
    _stream(pipe, cpu)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    groups = [block._diffusers_hook.get_hook("group_offloading").group.modules for block in blocks]
    assert groups == [[block] for block in blocks]
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        assert any(hasattr(part, "_diffusers_hook") for part in encoder.modules())
    with adapter.use(anna):
        assert image() == shown != before
    assert image() == before


@pytest.mark.parametrize("name", LEVELS)
def test_identity_acts_at_every_level(name: str) -> None:
    pipe = tiny_pipe()
    adapter = fresh(pipe)
    plain = run(pipe)
    place_pipeline(pipe, name, torch.device("cpu"))
    before = run(pipe)
    assert (
        abs(before - plain).max()
        < (0.5 if LEVELS[name].transformer == "fp8" else 1e-6) * abs(plain).max()
    )
    images = []
    for person in (anna, ben):
        with adapter.use(person):
            images.append(run(pipe))
    assert abs(images[0] - images[1]).max() > 1e-3 and abs(images[0] - before).max() > 1e-3
    assert (run(pipe) == before).all()
