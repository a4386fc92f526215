"""ControlNets, LoRAs, textual inversion and face refinement on the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file

from openpulid.errors import OptionError
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS
from openpulid.pipelines.presets import PRESETS, mini, mini_lightning
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.published_controls import PUBLISHED_CONTROLS
from openpulid.pipelines.request import FaceRefinement, GenerationRequest
from openpulid.pipelines.request_inputs import Control, Embedding, Lora, StyleImage
from openpulid.pipelines.weights import find_installed
from openpulid.web.add_ons import CONTROL_PREFIXES, describe_add_ons, style_choices
from openpulid.web.file_lines import FileLine, add_lines, check_name, read_lines
from openpulid.web.restore import describe_files, read_values
from openpulid.web.session import WebSession

pytest.importorskip("gradio", reason="extra web is not installed", exc_type=ImportError)

from tests.web.page_support import (
    build_request,
    generate,
    pixels,
    run_page,
)


@pytest.fixture
def session(tmp_path: Path) -> WebSession:
    return WebSession(tmp_path, allow_paths=True)


@pytest.fixture
def other_machines(tmp_path: Path) -> WebSession:
    """A page that other machines can open."""
    return WebSession(tmp_path)


def save_controlnet(session: WebSession, folder: Path) -> None:
    """Write a ControlNet for the miniature that has an effect."""
    torch.manual_seed(0)
    studio = session.studio(session.select_models("mini-lightning"))
    net = ControlNetModel.from_unet(studio.pipe.unet)
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.05)
    net.save_pretrained(folder)


def test_controlnets_with_a_person(
    session: WebSession, tmp_path: Path, anna: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_installed(PUBLISHED_CONTROLS) == []
    save_controlnet(session, tmp_path / WEIGHTS["control-edges"].repo.split("/")[-1])
    assert find_installed(PUBLISHED_CONTROLS) == ["control-edges"]
    person = {"reference_images": [(str(anna), None)]}
    control = {"control": "control-edges", "control_image": str(anna), "control_scale": 0.5}
    (plain,) = generate(session, **person)
    (controlled,) = generate(session, **person, **control)
    (again,) = generate(session, **person)
    assert pixels(controlled) != pixels(plain) == pixels(again)
    request = Provenance.read(controlled.file).request
    assert request.controls == (Control("control-edges", "anna.png", scale=0.5),)
    (update,) = run_page(session, **person, second_control_image=str(anna))
    assert update["problem"] == ("ControlNet is missing.", "second_control")
    fourth = {f"fourth_{name}": value for name, value in control.items()}
    fourth |= {"fourth_control_map": "ready", "fourth_control_end": 0.5}
    (both,) = generate(session, **person, **control, **fourth)
    assert pixels(both) not in (pixels(controlled), pixels(plain))
    request = Provenance.read(both.file).request
    assert request.controls[1] == Control(
        "control-edges", "anna.png", scale=0.5, end=0.5, is_map=True
    )
    values = read_values(request, mini())
    assert values["second_control_map"] == "ready" and values["second_control_end"] == 0.5
    assert values["control_map"] == "" and values["control"] == "control-edges"


def test_own_controlnet_is_a_folder(session: WebSession, tmp_path: Path, anna: Path) -> None:
    save_controlnet(session, tmp_path / "own-net")
    form = {
        "control": f" {tmp_path / 'own-net'} ",
        "control_image": str(anna),
        "control_kind": "edges",
        "control_map": "detect",
    }
    (plain,) = generate(session)
    (controlled,) = generate(session, **form)
    assert pixels(controlled) != pixels(plain)
    provenance = Provenance.read(controlled.file)
    assert provenance.request.controls == (
        Control("own-net", "anna.png", kind="edges", is_map=False),
    )
    values = read_values(provenance.request, mini())
    # a folder is not opened because an image names it
    assert values["control"] == "" and values["control_kind"] == "edges"
    assert values["control_map"] == "detect"
    assert describe_files(provenance) == "Add the same files again: own-net, anna.png."


@pytest.mark.parametrize(
    ("form", "message", "place"),
    [
        (
            {"third_control": "no-net"},
            "ControlNet: 'no-net' is neither one of the list nor OWNER/NAME on the hub nor an "
            "absolute path.",
            "third_control",
        ),
        (
            {"control": "owner/none", "control_image": "{image}"},
            "owner/none is not installed; `pulid weights get owner/none` downloads it",
            "control",
        ),
        ({"control": "/none/net", "control_image": "{image}"}, "/none/net", "control"),
        ({"lora_lines": "owner/none:0.5"}, "owner/none is not installed;", "loras"),
        (
            {"lora_lines": "film.safetensors:0.5"},
            "LoRAs: 'film.safetensors' is neither one of the files above nor OWNER/NAME on",
            "loras",
        ),
        (
            {"loras": ["/tmp/film.safetensors"], "lora_lines": "film.safetensors:strong"},
            "LoRA scale must be a number, got 'strong'.",
            "loras",
        ),
        (
            {"loras": ["/tmp/film.safetensors"], "lora_lines": "film.safetensors: 11"},
            "LoRA scale must be at most 10, got '11'.",
            "loras",
        ),
        (
            {"embedding_lines": "noir.safetensors:noir"},
            "Textual inversion: no file above has the name in 'noir.safetensors:noir'; add the",
            "loras",
        ),
    ],
)
def test_name_without_weights_is_one_sentence_in_its_place(
    session: WebSession, anna: Path, form: dict[str, Any], message: str, place: str
) -> None:
    image = str(anna)
    values = {name: image if value == "{image}" else value for name, value in form.items()}
    (update,) = run_page(session, **values)
    text, shown = update["problem"]
    assert message in text and shown == place


def test_other_machines_name_no_files_of_the_server(
    other_machines: WebSession, tmp_path: Path, anna: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for form in (
        {"control": str(tmp_path), "control_image": str(anna)},
        {"lora_lines": "/srv/film.safetensors"},
    ):
        (update,) = run_page(other_machines, **form)
        assert "this page opens no files of its server" in update["problem"][0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for allow_paths in (False, True):
        with pytest.raises(OptionError, match="'owner/name' is neither one of the list nor OWNER"):
            check_name("owner/name", "controls.0.model", (), "one of the list", allow_paths)


def test_lines_name_files_and_their_values() -> None:
    uploads = ["/a/film.safetensors", "/b/film.safetensors", "/c/x:1.safetensors", "/d/x"]
    text = "film.safetensors : 0.5 \n\nowner/name:-1\nowner/other\nx:1.safetensors:2"
    assert read_lines(text, uploads) == [
        FileLine("/a/film.safetensors", "0.5", True),
        FileLine("owner/name", "-1", False),
        FileLine("owner/other", "", False),
        FileLine("/c/x:1.safetensors", "2", True),
        FileLine("/b/film.safetensors", "", True),
        FileLine("/d/x", "", True),
    ]
    assert read_lines(None, None) == []
    added = add_lines("owner/name:2\nfilm.safetensors:0.5", uploads[:3], "1").splitlines()
    assert added[2:] == ["film.safetensors:1", "x:1.safetensors:1"]
    assert add_lines("", ["/a/film-noir.safetensors"], "{}") == "film-noir.safetensors:film-noir"


def test_lora_and_textual_inversion(session: WebSession, tmp_path: Path) -> None:
    pipe = session.studio(session.models).pipe
    lora, word = tmp_path / "bold.safetensors", tmp_path / "sketchy.safetensors"
    layer = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    width_out, width_in = pipe.unet.get_submodule(layer).weight.shape
    random = torch.Generator().manual_seed(0)
    sides = {"A": (4, width_in), "B": (width_out, 4)}
    save_file(
        {
            f"unet.{layer}.lora_{side}.weight": torch.randn(shape, generator=random)
            for side, shape in sides.items()
        },
        lora,
    )
    encoders = {"clip_l": pipe.text_encoder, "clip_g": pipe.text_encoder_2}
    save_file(
        {
            name: torch.randn(1, encoder.config.hidden_size, generator=random)
            for name, encoder in encoders.items()
        },
        word,
    )
    second = tmp_path / "more" / "bold.safetensors"
    second.parent.mkdir()
    second.write_bytes(lora.read_bytes())
    files = {
        "loras": [str(lora), str(second)],
        "lora_lines": "bold.safetensors:1.5\nbold.safetensors:-0.25",
        "embeddings": [str(word)],
        "embedding_lines": "sketchy.safetensors:<sketch>",
    }
    (plain,) = generate(session, prompt="portrait")
    (changed,) = generate(session, prompt="portrait, <sketch>", **files)
    assert pixels(changed) != pixels(plain)
    provenance = Provenance.read(changed.file)
    request = provenance.request
    assert request.loras == (
        Lora("bold.safetensors", scale=1.5),
        Lora("bold.safetensors", scale=-0.25),
    )
    assert request.embeddings == (Embedding("sketchy.safetensors", token="<sketch>"),)
    values = read_values(request, mini())
    assert values["lora_lines"] == "bold.safetensors:1.5\nbold.safetensors:-0.25"
    assert values["embedding_lines"] == "sketchy.safetensors:<sketch>"
    assert describe_files(provenance) == (
        "Add the same files again: bold.safetensors, sketchy.safetensors."
    )
    again = build_request(session, tmp_path, **{**files, **values})
    assert [lora.scale for lora in again.loras] == [1.5, -0.25]
    assert again.embeddings[0].token == "<sketch>"
    # without lines, the scale is 1 and the word the name of the file
    files = {"loras": [str(lora)], "embeddings": [str(word)]}
    request = build_request(session, tmp_path, **files)
    assert request.loras == (Lora(str(lora), scale=1.0),)
    assert request.embeddings[0].word == "sketchy"


def test_names_of_the_hub_are_restored(tmp_path: Path) -> None:
    request = GenerationRequest(
        "portrait",
        controls=[Control("owner/net", "map.png")],
        loras=[Lora("owner/film", scale=0.8)],
    )
    provenance = Provenance.create(mini().resolve(request), {})
    values = read_values(provenance.request, mini())
    assert values["control"] == "owner/net" and values["lora_lines"] == "owner/film:0.8"
    assert describe_files(provenance) == "Add the same files again: map.png."


def test_refinement_has_a_strength_and_a_size(session: WebSession, tmp_path: Path) -> None:
    form = {"refine_faces": True, "refine_strength": 0.4, "refine_size": 0.9}
    request = build_request(session, tmp_path, **form)
    assert request.refine_faces == FaceRefinement(strength=0.4, max_size=0.9)
    switched_off = build_request(session, tmp_path, **{**form, "refine_faces": False})
    assert switched_off.refine_faces is None
    assert build_request(session, tmp_path, refine_faces=True).refine_faces == FaceRefinement()
    preset = mini_lightning()
    values = read_values(preset.resolve(request), preset)
    assert {name: values[name] for name in form} == form
    values = read_values(preset.resolve(switched_off), preset)
    assert values["refine_faces"] is False and "refine_strength" not in values


def test_style_of_the_miniature_is_offered_once_it_is_trained(tmp_path: Path, anna: Path) -> None:
    form = {"style_image": str(anna), "style_scale": 0.7}
    trained = mini().with_models(detector=tmp_path / "detector.safetensors")
    assert style_choices(trained) == []
    assert "style_image" not in describe_add_ons(form, trained)
    (tmp_path / "style.safetensors").touch()
    assert style_choices(trained) == [("the miniature's own", "")]
    style = describe_add_ons({**form, "style_model": ""}, trained)["style_image"]
    assert StyleImage(**style) == StyleImage(str(anna), scale=0.7)
    assert style_choices(PRESETS["mini-flux"]()) == []


def test_settings_beyond_the_page_are_refused() -> None:
    """A setting that is dropped without a word would give another image."""
    controls = [Control("control-edges", "map.png")] * (len(CONTROL_PREFIXES) + 1)
    for changes, words in (
        ({"controls": controls}, "more than 4 ControlNets"),
        ({"controls": [Control("control-edges", "map.png", scale=3)]}, "a ControlNet of scale 3"),
        ({"identity": {"scale": 4}}, "Identity scale 4"),
        ({"refine_faces": {"strength": 0.01}}, "Change of refined faces 0.01"),
    ):
        request = GenerationRequest("portrait", seed=1, **changes)
        with pytest.raises(OptionError, match=f"{words}, which this page does not have; use `pul"):
            read_values(request, mini())
    style = StyleImage("style.png", scale=1.5)
    with pytest.raises(OptionError, match=r"a style of scale 1\.5"):
        read_values(GenerationRequest("portrait", style_image=style), PRESETS["sdxl"]())
