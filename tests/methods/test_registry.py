"""Selecting a method: presets, identity extractors, the studio and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from openpulid.bench.methods import check_weights
from openpulid.cli.main import app
from openpulid.errors import OptionError, WeightsError
from openpulid.identity.clip_extractor import load_clip_encoder
from openpulid.io.hub import WEIGHTS
from openpulid.methods.elite.attention import find_layers
from openpulid.methods.elite.encoders import Mapper, Mappers
from openpulid.methods.fastcomposer.encoders import FastComposerEncoder
from openpulid.methods.ip_adapter.faceid import FaceID
from openpulid.methods.registry import METHODS, TUNED_METHODS, UNPUBLISHED_METHODS, find_method
from openpulid.methods.tuned import TunedAdapter
from openpulid.pipelines.baselines import BASELINES
from openpulid.pipelines.checks import find_active_steps
from openpulid.pipelines.loading import load
from openpulid.pipelines.model_set import MINI_ADAPTERS
from openpulid.pipelines.presets import chroma, find_preset, flux, flux_schnell, mini, sdxl
from openpulid.pipelines.request import GenerationRequest
from openpulid.pipelines.selection import with_method
from openpulid.pipelines.studio import Studio
from openpulid.pipelines.weights import find_installed_methods
from openpulid.world import Person, Scene, render
from tests.support.clip_files import config, tower
from tests.support.token_files import published


@pytest.fixture(scope="module")
def faceid(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Load the miniature with an untrained FaceID."""
    pipe = load("mini").pipe
    file = tmp_path_factory.mktemp("faceid") / "faceid.safetensors"
    parts = published(pipe.unet, width=128)
    save_file(
        {f"{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()},
        file,
    )
    return load(with_method(mini(), "faceid", file))


def test_every_method_has_preset_and_licensed_weights() -> None:
    assert set(BASELINES) == set(METHODS) - {"pulid"}
    presets = {
        method: with_method(find_preset(baseline.family), method)
        for method, baseline in BASELINES.items()
        if method not in (*TUNED_METHODS, *UNPUBLISHED_METHODS)
    }
    for method, preset in presets.items():
        assert (
            preset.models.method == method
            and preset.models.adapter in WEIGHTS
            and preset.models.adapter in preset.published
        )
        assert all(WEIGHTS[name].license for name in preset.published)
        options = preset.defaults.identity.model_dump(exclude_none=True)
        assert options.keys() == {"scale", "start", "end"}
    read = {method: preset.models.recognition for method, preset in presets.items()}
    assert {method for method, name in read.items() if name == "arcface-loss"} == {
        "infiniteyou",
        "infiniteyou-sim",
    }
    assert {method for method, name in read.items() if name == "buffalo-l"} == {
        "faceid",
        "faceid-plus",
        "photomaker-v2",
    }
    views = {
        method: preset.models.clip_input
        for method, preset in presets.items()
        if method.startswith("ip-adapter")
    }
    assert views == {
        "ip-adapter": "image",
        "ip-adapter-plus": "image",
        "ip-adapter-plus-face": "face",
    }
    assert (
        not WEIGHTS["faceid"].commercial
        and not WEIGHTS["instantid"].commercial
        and not WEIGHTS["infusenet-sim"].commercial
        and WEIGHTS["photomaker"].commercial
    )
    assert {"identitynet", "identitynet-config"} <= set(presets["instantid"].published)
    assert {"infusenet-sim", "arcface-loss"} <= set(presets["infiniteyou-sim"].published)
    assert not {"eva", "parsing", "arcface"} & set(presets["infiniteyou"].published)
    assert with_method(sdxl(), "pulid") == sdxl()


@pytest.mark.parametrize("method", TUNED_METHODS)
def test_tuned_methods_need_the_file_of_a_person(method: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"`pulid tune {method}` writes it"):
        with_method(sdxl(), method)
    preset = with_method(sdxl(), method, tmp_path / "anna.safetensors")
    assert preset.models.has_own_person
    assert preset.published == ("juggernaut",)  # no face models are needed
    assert issubclass(find_method(method), TunedAdapter)


@pytest.mark.parametrize("method", UNPUBLISHED_METHODS)
def test_methods_without_published_file_need_one(method: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"no weights of {method} for SDXL .* --adapter"):
        with_method(sdxl(), method)
    assert method not in find_installed_methods(sdxl())
    if method not in MINI_ADAPTERS:
        with pytest.raises(OptionError, match=r"not available for the miniature|no weights of"):
            with_method(mini(), method)
    preset = with_method(sdxl(), method, tmp_path / "own.safetensors")
    face_models = {"w-plus": {"parsing", "e4e"}, "fastcomposer": set()}
    read = face_models.get(method, {"parsing", "arcface", "eva"})
    assert set(preset.published) == {"juggernaut", "detector", *read}
    steps = find_active_steps(preset.resolve(GenerationRequest(prompt="a")), preset.models)
    assert steps == list(range(6 if method in ("w-plus", "fastcomposer") else 0, 25))
    assert preset.reads_weights == (method in ("face0", "w-plus"))
    assert not preset.models.has_own_person


def test_unsupported_methods_raise() -> None:
    with pytest.raises(OptionError, match="no method 'hypernetwork'"):
        with_method(sdxl(), "hypernetwork")
    with pytest.raises(OptionError, match="a set of PuLID's options, not a method; use p"):
        with_method(sdxl(), "style")
    with pytest.raises(OptionError, match="instantid is only available for SDXL presets"):
        with_method(flux(), "instantid")
    for preset in (sdxl(), mini(), chroma()):
        message = f"infiniteyou is only available for FLUX presets, and {preset.name} is not one"
        with pytest.raises(OptionError, match=message):
            with_method(preset, "infiniteyou")
    with pytest.raises(
        OptionError, match="ip-adapter is not available for the miniature; available: pulid, faceid"
    ):
        with_method(mini(), "ip-adapter")
    with pytest.raises(WeightsError, match="this is not a CLIP vision encoder"):
        load_clip_encoder({"weight": torch.zeros(1)})


def test_options_of_a_method_are_those_of_its_base() -> None:
    pulid_only = {"start_step", "pose_from_prompt", "style_image"}
    for preset in (flux(), flux_schnell()):
        changed = with_method(preset, "infiniteyou")
        assert preset.options - changed.options == pulid_only
        assert changed.label == f"preset {preset.name!r} with infiniteyou"
        assert changed.defaults.num_inference_steps == preset.defaults.num_inference_steps
        assert changed.models.supports_masks
    assert not with_method(sdxl(), "faceid").models.supports_masks


@pytest.mark.parametrize("method", MINI_ADAPTERS)
def test_untrained_baseline_error_names_build_command(method: str, tmp_path: Path) -> None:
    preset = with_method(mini(tmp_path), method)
    assert preset.models.adapter == tmp_path / MINI_ADAPTERS[method]
    assert method not in find_installed_methods(mini(tmp_path))
    with pytest.raises(WeightsError, match=f"pulid mini build --method {method}`"):
        load(preset)
    with pytest.raises(WeightsError, match=f"pulid mini build --method {method}`"):
        check_weights({method: with_method(mini(), method, tmp_path / MINI_ADAPTERS[method])})


def test_clip_encoder_is_rebuilt_from_tensors() -> None:
    index = tower()
    again = load_clip_encoder(
        {**index.state_dict(), "vision_model.embeddings.position_ids": torch.zeros(1, 5)}
    )
    assert again.config.hidden_size == config().hidden_size and again.config.image_size == 8
    pixels = torch.rand(1, 3, 8, 8)
    again.config.hidden_act = index.config.hidden_act
    assert torch.equal(again(pixels).image_embeds, index(pixels).image_embeds)


def test_studio_generates_with_another_method(faceid: Studio) -> None:
    assert isinstance(faceid.adapter, FaceID)
    portrait = render([Person.from_seed(3)], [Scene()]).image[0]
    identity = faceid.identify(_picture(portrait))
    options: dict[str, Any] = {"seed": 1, "num_inference_steps": 2}
    without = faceid.generate("portrait, photo", **options).images[0]
    images = faceid.generate("portrait, photo", identity, **options).images[0]
    assert images.tobytes() != without.tobytes()
    with pytest.raises(OptionError, match="only supported by PuLID"):
        faceid.generate("portrait, photo", [(identity, None)], **options)


def own_file(method: str, pipe: Any, path: Path) -> Path:
    """Write an untrained file of a method without published weights, for the miniature."""
    torch.manual_seed(1)
    width = pipe.unet.config.cross_attention_dim
    if method == "fastcomposer":
        small = config()
        small.projection_dim = width
        metadata = {"tower": json.dumps(small.to_diff_dict())}
        save_file(FastComposerEncoder(small).state_dict(), path, metadata)
        return path
    layers = {name: layer.to_k.out_features for name, layer in find_layers(pipe.unet).items()}
    mappers = Mappers(Mapper(96, 8, width, layers), Mapper(96, 8, width, layers))
    save_file(mappers.state_dict(), path)
    return path


@pytest.mark.parametrize("method", ["elite", "fastcomposer"])
def test_studio_generates_with_a_file_of_the_user(method: str, tmp_path: Path) -> None:
    file = own_file(method, load("mini").pipe, tmp_path / "own.safetensors")
    studio = load(with_method(mini(), method, file))
    identity = studio.identify(_picture(render([Person.from_seed(3)], [Scene()]).image[0]))
    options: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "start": 0.0}
    without = studio.generate("portrait, photo", **options).images[0]
    images = studio.generate("portrait, photo", identity, **options).images[0]
    assert images.tobytes() != without.tobytes()
    again = studio.generate("portrait, photo", **options).images[0]
    assert again.tobytes() == without.tobytes()
    with pytest.raises(OptionError, match=f"has weights, .*which {method} does not support"):
        studio.generate("(portrait:1.2)", identity, **options)


def test_cli_selects_methods(tmp_path: Path) -> None:
    picture = tmp_path / "person.png"
    _picture(render([Person.from_seed(3)], [Scene()]).image[0]).save(picture)
    calls = ["generate", "portrait, photo", "--id", str(picture), "-o", str(tmp_path)]
    for method, message in (
        ("hypernetwork", "no method 'hypernetwork'"),
        ("ip-adapter", "ip-adapter is not available for the miniature"),
    ):
        result = CliRunner().invoke(app, [*calls, "--method", method])
        assert isinstance(result.exception, OptionError) and message in str(result.exception)
    result = CliRunner().invoke(app, [*calls, "--method", "style", "--steps", "2"])
    assert result.exit_code == 0, result.output


def _picture(image: torch.Tensor) -> Any:
    from openpulid.io.image_grid import to_pil

    return to_pil(image[None])[0]
