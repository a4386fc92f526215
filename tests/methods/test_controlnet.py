"""ControlNet as a hook: equal to diffusers' pipeline, alone and with PuLID, and fully removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from openpulid.cli.main import app
from openpulid.errors import ImageError, OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.io.images import open_image
from openpulid.methods.control_maps.edges import canny_edges
from openpulid.methods.controlnet import ControlNet
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines.presets import MINIATURE
from tests.support.image_files import IMAGES
from tests.support.token_files import PROMPTS, controlnet, generate

PICTURE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


@pytest.fixture
def control(pipe: Any) -> ControlNet:
    created = ControlNet(controlnet(pipe.unet))
    created.attach(pipe)
    return created


def stock(pipe: Any, **options: Any) -> torch.Tensor:
    theirs = StableDiffusionXLControlNetPipeline.from_pipe(pipe, controlnet=controlnet(pipe.unet))
    theirs.set_progress_bar_config(disable=True)
    return generate(theirs, image=PICTURE[None].repeat(options.pop("count", 1), 1, 1, 1), **options)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_matches_diffusers_controlnet_pipeline(
    pipe: Any, control: ControlNet, guidance: float
) -> None:
    with control.use(PICTURE, scale=0.7):
        ours, both = generate(pipe, guidance=guidance), generate(pipe, PROMPTS, guidance=guidance)
    assert torch.allclose(
        ours, stock(pipe, guidance=guidance, controlnet_conditioning_scale=0.7), atol=1e-5
    )
    theirs = stock(
        pipe, prompts=PROMPTS, guidance=guidance, controlnet_conditioning_scale=0.7, count=2
    )
    assert torch.allclose(both, theirs, atol=1e-5)


def test_several_add_up_as_in_diffusers(pipe: Any, control: ControlNet) -> None:
    """Each has its own image, scale and span."""
    other = controlnet(pipe.unet)
    torch.manual_seed(4)
    for block in (*other.controlnet_down_blocks, other.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)
    second = ControlNet(other)
    second.attach(pipe)
    nets = [control.model, second.model]
    theirs = StableDiffusionXLControlNetPipeline.from_pipe(pipe, controlnet=nets)
    theirs.set_progress_bar_config(disable=True)
    images = [PICTURE, PICTURE.flip(-1)]
    for spans in (
        ((0.0, 1.0), (0.0, 1.0)),
        ((0.0, 0.5), (0.5, 1.0)),
        ((0.5, 1.0), (0.0, 1.0)),
        ((0.3, 1.0), (0.0, 0.6)),  # the second of two steps would end after .6
    ):
        expected = generate(
            theirs,
            image=[image[None] for image in images],
            controlnet_conditioning_scale=[0.7, 0.4],
            control_guidance_start=[start for start, _ in spans],
            control_guidance_end=[end for _, end in spans],
        )
        with (
            control.use(images[0], 0.7, *spans[0]),
            second.use(images[1], 0.4, *spans[1]),
        ):
            ours = generate(pipe)
        with control.use(images[0], 0.7, *spans[0]):
            alone = generate(pipe)
        assert torch.allclose(ours, expected, atol=1e-5)
        assert not torch.allclose(ours, alone, atol=1e-3)


def test_controlnet_reads_only_latents_of_inpainting_unet(pipe: Any, control: ControlNet) -> None:
    """Nine channels: latents, mask and masked image; the ControlNet reads the latents."""
    captured: list[torch.Size] = []
    control.model.conv_in.register_forward_pre_hook(
        lambda layer, args: captured.append(args[0].shape)
    )
    torch.manual_seed(0)
    wide = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    parts = {**pipe.components, "unet": wide}
    inpaint = StableDiffusionXLInpaintPipeline(**parts, requires_aesthetics_score=False)
    inpaint.set_progress_bar_config(disable=True)
    second = ControlNet(control.model)
    second.attach(inpaint)
    picture, mask = Image.new("RGB", (16, 16), "gray"), Image.new("L", (16, 16), 255)
    inputs = {"image": picture, "mask_image": mask, "height": 16, "width": 16, "strength": 1.0}
    baseline = generate(inpaint, **inputs)
    with second.use(PICTURE):
        assert not torch.allclose(generate(inpaint, **inputs), baseline, atol=1e-3)
    assert captured and {shape[1] for shape in captured} == {4}


def test_combines_with_pulid(pipe: Any, control: ControlNet) -> None:
    torch.manual_seed(0)
    adapter = PuLID.for_unet(pipe.unet, IDEncoder(12, 64, vit_dim=8, hidden_dim=16)).eval()
    for layer in adapter.id_adapter_attn_layers.values():
        torch.nn.init.normal_(layer.id_to_v.weight, std=0.5)
    identity = Identity(torch.randn(1, 1, 12), tuple(torch.randn(1, 10, 8) for _ in range(5)))
    adapter.attach(pipe)
    with adapter.use(identity), control.use(PICTURE):
        ours = generate(pipe, guidance=1.0)
    with adapter.use(identity):
        alone = generate(pipe, guidance=1.0)
    assert torch.allclose(ours, stock_with(pipe, adapter, identity), atol=1e-5)
    assert not torch.allclose(ours, alone, atol=1e-3)


def stock_with(pipe: Any, adapter: PuLID, identity: Identity) -> torch.Tensor:
    """Attach PuLID to the U-Net that diffusers' ControlNet pipeline runs."""
    adapter.attach(pipe.unet)
    with adapter.use(identity, pipe=pipe.unet):
        return stock(pipe, guidance=1.0)


def test_every_form_of_a_control_image_is_the_same(pipe: Any, control: ControlNet) -> None:
    """Transparent pixels are white in Python as in files."""
    path = IMAGES / "alpha-control.png"
    opened = open_image(path)
    images: list[Any] = [opened, path, str(path), Image.open(path), np.asarray(opened)]
    images.append(path.read_bytes())
    images.append(torch.from_numpy(np.array(opened)).permute(2, 0, 1))
    results = []
    for image in images:
        with control.use(image):
            results.append(generate(pipe, guidance=1.0))
    assert all(torch.equal(result, results[0]) for result in results)
    with control.use([path, path]):
        generate(pipe, PROMPTS, guidance=1.0)


def test_unusable_control_image_is_refused(control: ControlNet) -> None:
    for image in (3, None, []):
        with pytest.raises(OptionError, match="control image"), control.use(image):
            pass
    with pytest.raises(OptionError, match="expected an image, got int"), control.use([3]):
        pass
    with (
        pytest.raises(ImageError, match="float values must be from 0 to 1"),
        control.use(PICTURE * 255),
    ):
        pass
    with pytest.raises(ImageError, match="has the shape"), control.use(PICTURE[None, None]):
        pass


def test_stretched_control_image_is_noted_once(
    pipe: Any, control: ControlNet, caplog: pytest.LogCaptureFixture
) -> None:
    with control.use(Image.new("RGB", (128, 64))):
        generate(pipe)
    (message,) = caplog.messages
    assert "the control image has 128 x 64 pixels (width over height 2.00) and" in message
    caplog.clear()
    with control.use([PICTURE, Image.new("RGB", (100, 97))]):
        generate(pipe, PROMPTS)
    assert not caplog.messages


def test_span_limits_effect_and_pipeline_is_restored(pipe: Any, control: ControlNet) -> None:
    baseline = generate(pipe)
    with control.use(PICTURE, scale=0):
        assert torch.equal(generate(pipe), baseline)
    with control.use(PICTURE, end=0.5):
        half = generate(pipe)
    with control.use(PICTURE):
        full = generate(pipe)
    assert not torch.allclose(half, full, atol=1e-4) and not torch.allclose(
        half, baseline, atol=1e-4
    )
    assert torch.equal(generate(pipe), baseline) and not pipe.unet._forward_pre_hooks
    control.detach(pipe)
    with pytest.raises(OptionError, match="attach"), control.use(PICTURE):
        pass


def test_invalid_arguments_raise(pipe: Any, tmp_path: Path) -> None:
    second = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    second.register_to_config(cross_attention_dim=768)
    with pytest.raises(OptionError, match="another base model"):
        ControlNet(second).attach(pipe)
    with pytest.raises(WeightsError, match="no diffusers ControlNet"):
        ControlNet.load(tmp_path)
    fits = ControlNet(controlnet(pipe.unet))
    fits.attach(pipe)
    with pytest.raises(OptionError, match="0 to 1"), fits.use(PICTURE, start=2):
        pass
    calls = ["generate", "portrait, photo", "--control", str(tmp_path)]
    result = CliRunner().invoke(app, calls)
    assert isinstance(result.exception, OptionError)
    assert "--control-image is missing" in str(result.exception)


def test_cli_generates_with_canny_edges(tmp_path: Path) -> None:
    """Uses a ControlNet with the shape of the miniature's U-Net."""
    from diffusers import UNet2DConditionModel

    page = Image.new("RGB", (96, 96), "black")
    ImageDraw.Draw(page).rectangle([20, 20, 70, 70], fill="white")
    edges = canny_edges(page)
    assert (
        edges.mode == "RGB"
        and max(edges.getpixel((x, 40)) for x in (18, 19, 20, 21)) == (255, 255, 255)
        and edges.getpixel((45, 45)) == (0, 0, 0)
    )
    page.save(tmp_path / "page.png")
    unet = UNet2DConditionModel.from_pretrained(MINIATURE / "pipeline" / "unet")
    created = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    torch.manual_seed(0)
    torch.nn.init.normal_(created.controlnet_mid_block.weight, std=0.3)
    created.save_pretrained(tmp_path / "net")
    calls = ["generate", "portrait, photo", "--steps", "2"]
    plain, images = tmp_path / "plain", tmp_path / "shown"
    control = ["--control", str(tmp_path / "net"), "--control-image", str(tmp_path / "page.png")]
    for arguments in ([*calls, "-o", str(plain)], [*calls, *control, "-o", str(images)]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.exception
    pictures = [next(folder.glob("*.png")) for folder in (plain, images)]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    again = ["generate", "--from", str(pictures[1]), *control, "-o", str(tmp_path / "again")]
    result = CliRunner().invoke(app, again)
    again = next((tmp_path / "again").glob("*.png"))
    assert (
        result.exit_code == 0 and Image.open(again).tobytes() == Image.open(pictures[1]).tobytes()
    )
