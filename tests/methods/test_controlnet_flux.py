"""ControlNet for FLUX as a hook: equal to diffusers' pipelines, alone, together and with PuLID."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxMultiControlNetModel,
    FluxPipeline,
)
from torch import Tensor

from openpulid.errors import OptionError, WeightsError
from openpulid.methods.controlnet import ControlNet
from openpulid.methods.controlnet_flux import FluxControlNet
from tests.support.people import anna, distance
from tests.support.tiny_flux import fresh, tiny_controlnet, tiny_pipe
from tests.support.tiny_flux import run as run_with_defaults


def picture(seed: int, side: int = 32) -> Tensor:
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed))


FIRST, SECOND = picture(3), picture(4)
RANGE = (2 * FIRST[None] - 1, 2 * SECOND[None] - 1)
"""The same from -1 to 1: diffusers' pipelines take tensors as they are."""
NOISE = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(5))


def run(*args: Any, **options: Any) -> np.ndarray:
    """Run a pipeline with the same guidance as the others, whose defaults differ."""
    return run_with_defaults(*args, guidance_scale=4.0, **options)


@pytest.fixture
def pipe() -> FluxPipeline:
    """Return a pipeline whose autoencoder predicts a mean without variance.

    diffusers' pipelines sample the latents of control images.
    """
    created = tiny_pipe()
    last = created.vae.encoder.conv_out
    with torch.no_grad():
        last.weight[len(last.weight) // 2 :] = 0
        last.bias[len(last.bias) // 2 :] = -30
    return created


def within(pipe: FluxPipeline, kind: type, **parts: Any) -> Any:
    """Create a pipeline of another kind from the components."""
    names = ("image_encoder", "feature_extractor")
    components = {name: part for name, part in pipe.components.items() if name not in names}
    second = kind(**components, **parts)
    second.set_progress_bar_config(disable=True)
    return second


def attached(net: Any, pipe: Any) -> FluxControlNet:
    created = FluxControlNet(net)
    created.attach(pipe)
    return created


@pytest.mark.parametrize("negative", [False, True])
def test_matches_diffusers_controlnet_pipeline(pipe: Any, negative: bool) -> None:
    net = tiny_controlnet()
    theirs = within(pipe, FluxControlNetPipeline, controlnet=net)
    expected = run(
        theirs,
        negative,
        latents=NOISE,
        control_image=RANGE[0],
        controlnet_conditioning_scale=0.7,
    )
    plain = run(pipe, negative, latents=NOISE)
    with attached(net, pipe).use(FIRST, scale=0.7):
        ours = run(pipe, negative, latents=NOISE)
    assert distance(ours, expected) < 1e-5 < 1e-2 < distance(ours, plain)
    assert np.array_equal(run(pipe, negative, latents=NOISE), plain)
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize("end", [0.75, 0.6])
def test_several_add_up_as_in_diffusers(pipe: Any, end: float) -> None:
    """Each has its own image, scale and span, whose last step may end later."""
    nets = [tiny_controlnet(1), tiny_controlnet(2)]
    theirs = within(pipe, FluxControlNetPipeline, controlnet=FluxMultiControlNetModel(nets))
    expected = run(
        theirs,
        latents=NOISE,
        control_image=list(RANGE),
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.5],
        control_guidance_end=[end, 1.0],
    )
    one, other = (attached(net, pipe) for net in nets)
    with one.use(FIRST, scale=0.7, end=end), other.use(SECOND, scale=0.4, start=0.5):
        ours = run(pipe, latents=NOISE)
    with one.use(FIRST, scale=0.7, end=end):
        alone = run(pipe, latents=NOISE)
    assert distance(ours, expected) < 1e-5 < 1e-3 < distance(ours, alone)


def test_union_with_modes(pipe: Any) -> None:
    """One network serves two kinds at once."""
    net = tiny_controlnet(num_mode=5)
    theirs = within(pipe, FluxControlNetPipeline, controlnet=FluxMultiControlNetModel([net]))
    expected = run(
        theirs,
        latents=NOISE,
        control_image=list(RANGE),
        control_mode=[0, 4],
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.0],
        control_guidance_end=[1.0, 1.0],
    )
    union = attached(net, pipe)
    with union.use(FIRST, 0.7, mode=0), union.use(SECOND, 0.4, mode=4):
        ours = run(pipe, latents=NOISE)
    with union.use(FIRST, 0.7, mode=1), union.use(SECOND, 0.4, mode=4):
        changed = run(pipe, latents=NOISE)
    assert distance(ours, expected) < 1e-5 < 1e-3 < distance(ours, changed)
    for mode in (None, 5, -1):
        with pytest.raises(OptionError, match="serves 5 kinds"), union.use(FIRST, mode=mode):
            pass


def test_networks_of_different_depth_add_up(pipe: Any) -> None:
    """Each acts after the blocks after which it acts alone; diffusers drops the rest."""
    recorded: dict[str, list[Tensor]] = {}

    def record(name: str) -> None:
        double = pipe.transformer.transformer_blocks
        single = pipe.transformer.single_transformer_blocks
        inputs = recorded.setdefault(name, [])
        hooks = []
        for block in (*double[1:], *single):
            hooks.append(
                block.register_forward_pre_hook(
                    lambda _, args, kwargs: inputs.append(kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            )
        run(pipe, steps=1, latents=NOISE)
        for hook in hooks:
            hook.remove()

    # blocks that pass on their input: what arrives is what was added
    for block in pipe.transformer.transformer_blocks:
        block.forward = lambda **kwargs: (kwargs["encoder_hidden_states"], kwargs["hidden_states"])
    for block in pipe.transformer.single_transformer_blocks:
        block.forward = lambda **kwargs: (kwargs["encoder_hidden_states"], kwargs["hidden_states"])
    deep, flat = attached(tiny_controlnet(1, 3, 2), pipe), attached(tiny_controlnet(2, 1, 0), pipe)
    record("none")
    with deep.use(FIRST):
        record("deep")
    with flat.use(SECOND):
        record("flat")
    with deep.use(FIRST), flat.use(SECOND):
        record("both")
    for none, one, other, both in zip(*recorded.values(), strict=True):
        assert torch.allclose(both, one + other - none, atol=1e-4)
        assert not torch.allclose(one, none) and not torch.allclose(other, none)


def test_controlnet_that_reads_pixels(pipe: Any) -> None:
    """As those of XLabs, whose residuals are repeated over the blocks."""
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, latent_channels=4, norm_num_groups=4, shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pipe = FluxPipeline(**{**pipe.components, "vae": vae.eval()})
    pipe.set_progress_bar_config(disable=True)
    net = tiny_controlnet(single=0, patch_size=2, conditioning_embedding_channels=4)
    theirs = within(pipe, FluxControlNetPipeline, controlnet=net)
    size = {"height": 128, "width": 128, "latents": NOISE}
    image = picture(3, 128)
    expected = run(theirs, control_image=2 * image[None] - 1, **size)
    with attached(net, pipe).use(image):
        ours = run(pipe, **size)
    assert distance(ours, expected) < 1e-5 < 1e-2 < distance(ours, run(pipe, **size))


def test_image_to_image_and_inpainting(pipe: Any) -> None:
    net = tiny_controlnet()
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    options = {"image": picture(7)[None], "strength": 0.75, "latents": NOISE}
    control = {"control_image": RANGE[0], "controlnet_conditioning_scale": 1.0}
    for kind, with_control, more in (
        (FluxImg2ImgPipeline, FluxControlNetImg2ImgPipeline, {}),
        (FluxInpaintPipeline, FluxControlNetInpaintPipeline, {"mask_image": mask}),
    ):
        theirs = within(pipe, with_control, controlnet=net)
        expected = run(theirs, **options, **more, **control)
        edit = within(pipe, kind)
        with attached(net, edit).use(FIRST):
            ours = run(edit, **options, **more)
        assert distance(ours, expected) < 1e-5 < 1e-3 < distance(ours, run(edit, **options, **more))


def test_combines_with_pulid(pipe: Any) -> None:
    net = tiny_controlnet()
    theirs = within(pipe, FluxControlNetPipeline, controlnet=net)
    adapter = fresh(pipe)
    adapter.attach(theirs)
    with adapter.use(anna, pipe=theirs):
        expected = run(theirs, True, latents=NOISE, control_image=RANGE[0])
    with attached(net, pipe).use(FIRST), adapter.use(anna, pipe=pipe):
        ours = run(pipe, True, latents=NOISE)
    with adapter.use(anna, pipe=pipe):
        alone = run(pipe, True, latents=NOISE)
    assert distance(ours, expected) < 1e-5 < 1e-2 < distance(ours, alone)


def test_one_image_per_prompt(pipe: Any) -> None:
    net = attached(tiny_controlnet(), pipe)
    both = torch.cat([NOISE, NOISE])
    with net.use([FIRST, SECOND]):
        together = run(pipe, count=2, latents=both)
    with net.use(FIRST):
        first = run(pipe, count=2, latents=both)
    assert distance(together[0], first[0]) < 1e-5 and distance(together[1], first[1]) > 1e-3


def test_fill_transformer_has_more_channels(pipe: Any) -> None:
    """The ControlNet reads the latents alone."""
    wide = tiny_pipe(in_channels=16 + 16 + 16, out_channels=16)
    fill = within(wide, FluxFillPipeline)
    options = {"image": FIRST[None], "mask_image": torch.ones(1, 1, 32, 32)}
    plain = run(fill, **options)
    with attached(tiny_controlnet(), fill).use(SECOND):
        assert distance(run(fill, **options), plain) > 1e-3


def test_group_offloading_changes_nothing(pipe: Any) -> None:
    """A ControlNet that is placed elsewhere is not moved."""
    net = attached(tiny_controlnet(), pipe)
    with net.use(FIRST):
        expected = run(pipe)
    cpu = torch.device("cpu")
    options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    net.model.enable_group_offload(onload_device=cpu, offload_device=cpu, **options)
    net.is_placed = True
    with net.use(FIRST):
        assert np.array_equal(run(pipe), expected)


def test_unsuitable_models_are_refused(pipe: Any, tmp_path: Path) -> None:
    other = tiny_controlnet(joint_attention_dim=32)
    with pytest.raises(OptionError, match=r"another base model; use one for FLUX\.1"):
        FluxControlNet(other).attach(pipe)
    schnell = tiny_pipe(guidance_embeds=False)
    with pytest.raises(OptionError, match=r"FLUX\.1-schnell does not have"):
        FluxControlNet(tiny_controlnet()).attach(schnell)
    FluxControlNet(tiny_controlnet(guidance_embeds=False)).attach(schnell)
    bare = attached(tiny_controlnet(), pipe.transformer)
    message = "has no autoencoder; attach to a FLUX pipeline"
    with pytest.raises(OptionError, match=message), bare.use(FIRST):
        run(pipe)
    kontext = within(pipe, FluxKontextPipeline)
    net = attached(tiny_controlnet(), kontext)
    with pytest.raises(OptionError, match="do not support reference images"), net.use(FIRST):
        run(kontext, image=FIRST[None], _auto_resize=False, max_area=32 * 32)
    tiny_controlnet().save_pretrained(tmp_path / "net")
    loaded = FluxControlNet.load(tmp_path / "net").model
    assert loaded.dtype == torch.bfloat16
    with pytest.raises(WeightsError, match="holds a FluxControlNetModel, not a ControlNetModel"):
        ControlNet.load(tmp_path / "net")


def test_compiled_transformer_is_refused(pipe: Any) -> None:
    """Compiled code ignores hooks that are added later."""
    pipe.transformer.compile(backend="eager")
    with (
        pytest.raises(OptionError, match="compile_repeated_blocks"),
        attached(tiny_controlnet(), pipe).use(FIRST),
    ):
        pass
    torch.compiler.reset()
