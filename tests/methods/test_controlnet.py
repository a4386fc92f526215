"""A ControlNet by a hook: what diffusers' own pipeline draws, alone and with PuLID, and nothing left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
from openpulid.errors import OptionError, WeightsError
from openpulid.identity.identity import Identity
from openpulid.methods.controlnet import ControlNet, canny_edges
from openpulid.methods.pulid.encoders import IDEncoder
from openpulid.methods.pulid.sdxl import PuLID
from openpulid.pipelines.presets import MINIATURE
from tests.support.token_files import PROMPTS, controlnet, drawn

PICTURE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pipe(tiny_pipeline: Any) -> Any:
    return tiny_pipeline()


@pytest.fixture
def control(pipe: Any) -> ControlNet:
    made = ControlNet(controlnet(pipe.unet))
    made.attach(pipe)
    return made


def stock(pipe: Any, **options: Any) -> torch.Tensor:
    theirs = StableDiffusionXLControlNetPipeline.from_pipe(pipe, controlnet=controlnet(pipe.unet))
    theirs.set_progress_bar_config(disable=True)
    return drawn(theirs, image=PICTURE[None].repeat(options.pop("count", 1), 1, 1, 1), **options)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_is_what_diffusers_draws(pipe: Any, control: ControlNet, guidance: float) -> None:
    with control.use(PICTURE, scale=0.7):
        ours, both = drawn(pipe, guidance=guidance), drawn(pipe, PROMPTS, guidance=guidance)
    assert torch.allclose(
        ours, stock(pipe, guidance=guidance, controlnet_conditioning_scale=0.7), atol=1e-5
    )
    theirs = stock(
        pipe, prompts=PROMPTS, guidance=guidance, controlnet_conditioning_scale=0.7, count=2
    )
    assert torch.allclose(both, theirs, atol=1e-5)


def test_a_unet_for_inpainting_is_given_more_than_the_control_net(
    pipe: Any, control: ControlNet
) -> None:
    """Nine channels: the latents, which alone it reads, the mask, and what is kept."""
    seen: list[torch.Size] = []
    control.net.conv_in.register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape))
    torch.manual_seed(0)
    wide = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    parts = {**pipe.components, "unet": wide}
    inpaint = StableDiffusionXLInpaintPipeline(**parts, requires_aesthetics_score=False)
    inpaint.set_progress_bar_config(disable=True)
    other = ControlNet(control.net)
    other.attach(inpaint)
    picture, mask = Image.new("RGB", (16, 16), "gray"), Image.new("L", (16, 16), 255)
    given = {"image": picture, "mask_image": mask, "height": 16, "width": 16, "strength": 1.0}
    before = drawn(inpaint, **given)
    with other.use(PICTURE):
        assert not torch.allclose(drawn(inpaint, **given), before, atol=1e-3)
    assert seen and {shape[1] for shape in seen} == {4}


def test_together_with_pulid(pipe: Any, control: ControlNet) -> None:
    torch.manual_seed(0)
    adapter = PuLID.for_unet(pipe.unet, IDEncoder(12, 64, vit_dim=8, hidden_dim=16)).eval()
    for layer in adapter.id_adapter_attn_layers.values():
        torch.nn.init.normal_(layer.id_to_v.weight, std=0.5)
    who = Identity(torch.randn(1, 1, 12), tuple(torch.randn(1, 10, 8) for _ in range(5)))
    adapter.attach(pipe)
    with adapter.use(who), control.use(PICTURE):
        ours = drawn(pipe, guidance=1.0)
    with adapter.use(who):
        alone = drawn(pipe, guidance=1.0)
    assert torch.allclose(ours, stock_with(pipe, adapter, who), atol=1e-5)
    assert not torch.allclose(ours, alone, atol=1e-3)


def stock_with(pipe: Any, adapter: PuLID, who: Identity) -> torch.Tensor:
    """PuLID on the U-Net itself, which diffusers' ControlNet pipeline runs."""
    adapter.attach(pipe.unet)
    with adapter.use(who, pipe=pipe.unet):
        return stock(pipe, guidance=1.0)


def test_spans_and_nothing_left_behind(pipe: Any, control: ControlNet) -> None:
    before = drawn(pipe)
    with control.use(PICTURE, scale=0):
        assert torch.equal(drawn(pipe), before)
    with control.use(PICTURE, end=0.5):
        half = drawn(pipe)
    with control.use(PICTURE):
        whole = drawn(pipe)
    assert not torch.allclose(half, whole, atol=1e-4) and not torch.allclose(
        half, before, atol=1e-4
    )
    assert torch.equal(drawn(pipe), before) and not pipe.unet._forward_pre_hooks
    control.detach(pipe)
    with pytest.raises(OptionError, match="attach"), control.use(PICTURE):
        pass


def test_what_does_not_fit_is_said(pipe: Any, tmp_path: Path) -> None:
    other = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    other.register_to_config(cross_attention_dim=768)
    with pytest.raises(OptionError, match="another kind of base"):
        ControlNet(other).attach(pipe)
    with pytest.raises(WeightsError, match="no ControlNet"):
        ControlNet.load(tmp_path)
    fits = ControlNet(controlnet(pipe.unet))
    fits.attach(pipe)
    with pytest.raises(OptionError, match="0 to 1"), fits.use(PICTURE, start=2):
        pass
    asked = ["generate", "portrait, photo", "--control", str(tmp_path)]
    result = CliRunner().invoke(app, asked)
    assert isinstance(result.exception, OptionError) and "--control-image is missing" in str(
        result.exception
    )


def test_edges_are_drawn_and_followed(tmp_path: Path) -> None:
    """On the command line, with a ControlNet of the miniature's shape."""
    from diffusers import UNet2DConditionModel

    page = Image.new("RGB", (96, 96), "black")
    ImageDraw.Draw(page).rectangle([20, 20, 70, 70], fill="white")
    found = canny_edges(page)
    assert (
        found.mode == "RGB"
        and max(found.getpixel((x, 40)) for x in (18, 19, 20, 21)) == (255, 255, 255)
        and found.getpixel((45, 45)) == (0, 0, 0)
    )
    page.save(tmp_path / "page.png")
    unet = UNet2DConditionModel.from_pretrained(MINIATURE / "pipeline" / "unet")
    made = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8))
    torch.manual_seed(0)
    torch.nn.init.normal_(made.controlnet_mid_block.weight, std=0.3)
    made.save_pretrained(tmp_path / "net")
    asked = ["generate", "portrait, photo", "--steps", "2"]
    plain, shown = tmp_path / "plain", tmp_path / "shown"
    more = [
        "--control",
        str(tmp_path / "net"),
        "--control-image",
        str(tmp_path / "page.png"),
        "-o",
        str(shown),
    ]
    for arguments in ([*asked, "-o", str(plain)], [*asked, *more]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.exception
    pictures = [next(folder.glob("*.png")) for folder in (plain, shown)]
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    result = CliRunner().invoke(
        app, ["generate", "--from", str(pictures[1]), "-o", str(tmp_path / "again")]
    )
    again = next((tmp_path / "again").glob("*.png"))
    assert (
        result.exit_code == 0 and Image.open(again).tobytes() == Image.open(pictures[1]).tobytes()
    )
