"""Choosing a method: presets, what reads people for it, the studio and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from openpulid.cli.main import app
from openpulid.errors import OptionError, WeightsError
from openpulid.identity.clip_extractor import load_clip_encoder
from openpulid.io.hub import WEIGHTS
from openpulid.methods.ip_adapter.faceid import FaceID
from openpulid.methods.registry import METHODS
from openpulid.pipelines.presets import BASELINES, flux, mini, sdxl, with_method
from openpulid.pipelines.studio import Studio, load
from openpulid.world import Person, Scene, render
from tests.support.clip_files import config, tower
from tests.support.token_files import published


@pytest.fixture(scope="module")
def faceid(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """The miniature with an untrained FaceID."""
    pipe = load("mini").pipe
    file = tmp_path_factory.mktemp("faceid") / "faceid.safetensors"
    parts = published(pipe.unet, width=128)
    save_file(
        {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()},
        file,
    )
    return load(with_method(mini(), "faceid", file))


def test_every_method_has_a_preset_and_its_weights_a_licence() -> None:
    assert set(BASELINES) == set(METHODS) - {"pulid"}
    for method in BASELINES:
        preset = with_method(sdxl(), method)
        assert (
            preset.method == method
            and preset.adapter in WEIGHTS
            and preset.adapter in preset.published
        )
        assert all(WEIGHTS[name].license for name in preset.published)
        assert preset.identity_options().keys() == {"scale", "start", "end"}
    read = {method: with_method(sdxl(), method).recogniser for method in BASELINES}
    assert {method for method, name in read.items() if name == "buffalo-l"} == {
        "faceid",
        "faceid-plus",
        "photomaker-v2",
    }
    views = {
        method: with_method(sdxl(), method).view
        for method in BASELINES
        if method.startswith("ip-adapter")
    }
    assert views == {
        "ip-adapter": "picture",
        "ip-adapter-plus": "picture",
        "ip-adapter-plus-face": "face",
    }
    assert (
        not WEIGHTS["faceid"].commercial
        and not WEIGHTS["instantid"].commercial
        and WEIGHTS["photomaker"].commercial
    )
    assert {"identitynet", "identitynet-config"} <= set(with_method(sdxl(), "instantid").published)
    assert with_method(sdxl(), "pulid") == sdxl()


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(OptionError, match="no method 'dreambooth'"):
        with_method(sdxl(), "dreambooth")
    with pytest.raises(OptionError, match="instantid is for SDXL and flux is FLUX"):
        with_method(flux(), "instantid")
    with pytest.raises(OptionError, match="the miniature has no ip-adapter; it has pulid, faceid"):
        with_method(mini(), "ip-adapter")
    with pytest.raises(WeightsError, match="this is no CLIP picture tower"):
        load_clip_encoder({"weight": torch.zeros(1)})


def test_a_rival_that_was_not_trained_says_how(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="pulid mini build --method faceid"):
        load(with_method(mini(), "faceid", tmp_path / "faceid.safetensors"))


def test_a_published_tower_is_rebuilt_from_its_tensors() -> None:
    own = tower()
    again = load_clip_encoder(
        {**own.state_dict(), "vision_model.embeddings.position_ids": torch.zeros(1, 5)}
    )
    assert again.config.hidden_size == config().hidden_size and again.config.image_size == 8
    pixels = torch.rand(1, 3, 8, 8)
    again.config.hidden_act = own.config.hidden_act
    assert torch.equal(again(pixels).image_embeds, own(pixels).image_embeds)


def test_the_studio_shows_a_person_by_another_method(faceid: Studio) -> None:
    assert isinstance(faceid.adapter, FaceID)
    portrait = render([Person.from_seed(3)], [Scene()]).image[0]
    who = faceid.identify(_picture(portrait))
    options: dict[str, Any] = {"seed": 1, "steps": 2}
    without = faceid.generate("portrait, photo", **options).images[0]
    shown = faceid.generate("portrait, photo", who, **options).images[0]
    assert shown.tobytes() != without.tobytes()
    with pytest.raises(OptionError, match="masks in one image are PuLID's"):
        faceid.generate("portrait, photo", [(who, None)], **options)


def test_the_command_line_knows_methods(tmp_path: Path) -> None:
    picture = tmp_path / "person.png"
    _picture(render([Person.from_seed(3)], [Scene()]).image[0]).save(picture)
    asked = ["generate", "portrait, photo", "--id", str(picture), "-o", str(tmp_path)]
    for method, said in (
        ("dreambooth", "no method 'dreambooth'"),
        ("ip-adapter", "the miniature has no ip-adapter"),
    ):
        result = CliRunner().invoke(app, [*asked, "--method", method])
        assert isinstance(result.exception, OptionError) and said in str(result.exception)
    result = CliRunner().invoke(app, [*asked, "--method", "style", "--steps", "2"])
    assert result.exit_code == 0, result.output


def _picture(image: torch.Tensor) -> Any:
    from openpulid.io.image_grid import to_pil

    return to_pil(image[None])[0]
