"""The page in the browser: asked over HTTP as a browser asks, on the shipped miniature."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from openpulid import __version__
from openpulid.cli.web import web as web_command
from openpulid.errors import FaceError, OptionError
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS
from openpulid.pipelines.factory import installed_methods, missing_weights
from openpulid.pipelines.presets import (
    BASELINES,
    MINI_BASELINES,
    MINIATURE,
    mini,
    mini_lightning,
    sdxl,
    with_method,
)
from openpulid.web import page as web
from openpulid.web.session import WebSession, installed_controls, installed_presets
from openpulid.world.gallery import render_portrait

gradio = pytest.importorskip("gradio", reason="extra web is not installed", exc_type=ImportError)
SETTINGS: dict[str, Any] = {
    "face": None,
    "prompt": "portrait, photo, smiling", "preset": "mini-lightning", "method": "pulid", "scale": 1.0, "images": 2, "seed": 3,
    "alone": True, "negative": "", "steps": None, "guidance": None, "size": "", "start": 0.0, "end": 1.0,
    "control": "", "control_picture": None, "control_scale": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def anna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("people") / "anna.png"
    render_portrait(1_000_007).save(file)
    return file


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from gradio_client import Client

    with web.open_app("mini") as blocks:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        _, url, _ = blocks.launch(
            server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True
        )
        yield Client(url, verbose=False)
        blocks.close()


def as_gallery(file: Path) -> list[dict[str, Any]]:
    from gradio_client import handle_file

    return [{"image": handle_file(str(file)), "caption": None}]


def test_photo_and_prompt_to_images_that_say_how_they_were_made(client: Any, anna: Path) -> None:
    asked = {
        **SETTINGS,
        "face": 0,
        "steps": 0,
        "guidance": 0,
    }  # as the page sends what nobody has changed
    made = client.predict(
        photos=as_gallery(anna), identity_file=None, **asked, api_name="/generate"
    )
    assert [one["caption"] for one in made] == [
        "seed 3",
        "seed 3, nobody",
        "seed 4",
        "seed 4, nobody",
    ]
    images = [Image.open(one["image"]) for one in made]
    assert len({image.tobytes() for image in images}) == 4
    request = json.loads(images[2].info["openpulid"])
    assert (
        request["seed"] == 4
        and request["id"] == "anna.png"
        and request["preset"] == "mini-lightning"
    )
    used = {
        "steps": 4,
        "guidance": 1.0,
        "scale": 1.0,
        "projection": "none",
        "size": "96x96",
        "version": __version__,
    }
    assert used.items() <= request.items()  # the preset's own figures, too
    assert json.loads(images[1].info["openpulid"])["id"] is None


def test_a_person_is_invented_and_read(client: Any) -> None:
    (person,) = client.predict(api_name="/person")
    assert Image.open(person["image"]).size == (96, 96)
    seen = client.predict(
        as_gallery(Path(person["image"])), None, None, "mini", "pulid", api_name="/faces"
    )
    assert Image.open(seen).width > 96


def test_no_number_is_empty() -> None:
    """Gradio shows an empty one as 0, which must then be what it means: the preset's own."""
    with web.open_app("mini") as blocks:
        numbers = [block for block in blocks.blocks.values() if isinstance(block, gradio.Number)]
    assert len(numbers) == 5 and not [number.label for number in numbers if number.value is None]


def test_what_can_be_put_right_is_said_on_the_page(client: Any, anna: Path) -> None:
    with pytest.raises(Exception, match="does not know 'spaceship'"):
        wrong = {**SETTINGS, "prompt": "portrait, spaceship"}
        client.predict(photos=as_gallery(anna), identity_file=None, **wrong, api_name="/generate")
    with pytest.raises(Exception, match="give photos"):
        client.predict(None, None, None, "mini", "pulid", api_name="/faces")


def test_one_studio_at_a_time(tmp_path: Path, anna: Path) -> None:
    desk = WebSession(tmp_path)
    studio = desk.studio("mini-lightning", "pulid")
    assert desk.studio("mini-lightning", "pulid") is studio
    studio.identify([str(anna)]).save(tmp_path / "anna.safetensors")
    known = {**SETTINGS, "images": 1, "alone": False}
    known |= {"size": None, "negative": None}  # as a browser sends what is empty
    (one,) = desk.generate(None, str(tmp_path / "anna.safetensors"), **known)
    (other,) = desk.generate([(str(anna), None)], None, **known)
    assert Image.open(one[0]).tobytes() == Image.open(other[0]).tobytes()
    with pytest.raises(OptionError, match="two people"):
        desk.generate([(str(anna), None)], str(tmp_path / "anna.safetensors"), **known)
    for given in ([(str(anna), None)], None), (None, str(tmp_path / "anna.safetensors")):
        with pytest.raises((FaceError, OptionError), match=r"no face 1|has its face already"):
            desk.generate(*given, **{**known, "face": 1})
    with pytest.raises(OptionError, match="say in the prompt"):
        desk.generate(None, None, **{**known, "prompt": " "})
    assert desk.studio("mini", "pulid") is not studio


def test_a_controlnet_beside_the_person(
    tmp_path: Path, anna: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = WebSession(tmp_path)
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(desk.studio("mini-lightning", "pulid").pipe.unet)
    for zero in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(zero.weight, std=0.05)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert installed_controls() == []
    net.save_pretrained(tmp_path / WEIGHTS["control-pose"].repo.split("/")[-1])
    assert installed_controls() == ["control-pose"]
    known = {**SETTINGS, "images": 1, "alone": False}
    beside = {"control": "control-pose", "control_picture": str(anna), "control_scale": 0.5}
    (plain,) = desk.generate([(str(anna), None)], None, **known)
    (one,) = desk.generate([(str(anna), None)], None, **{**known, **beside})
    (again,) = desk.generate([(str(anna), None)], None, **known)
    assert (
        Image.open(one[0]).tobytes()
        != Image.open(plain[0]).tobytes()
        == Image.open(again[0]).tobytes()
    )
    said = json.loads(Image.open(one[0]).info["openpulid"])
    assert {**beside, "control_picture": "anna.png"}.items() <= said.items()
    with pytest.raises(OptionError, match="go together"):
        desk.generate([(str(anna), None)], None, **{**known, "control_picture": str(anna)})


def test_the_first_preset_is_as_the_command_says_and_no_other(tmp_path: Path, anna: Path) -> None:
    own = Path(copyfile(MINIATURE / "pulid-stage1.safetensors", tmp_path / "adapter.safetensors"))
    desk = WebSession(tmp_path, preset="mini-lightning", adapter=own)
    assert desk.resolved("mini-lightning").adapter == own
    assert {"pulid", "faceid"} <= set(installed_methods(desk.resolved("mini-lightning")))
    assert installed_methods(desk.resolved("mini-lightning")) == installed_methods(mini_lightning())
    full = WebSession(tmp_path, preset="sdxl", adapter=own).resolved("sdxl")
    assert full.adapter == own and all(
        with_method(full, name) == with_method(sdxl(), name) for name in BASELINES
    )
    assert desk.resolved("mini").adapter == mini().adapter
    assert desk.resolved("mini-lightning", "faceid").adapter == MINIATURE / "faceid.safetensors"
    known = {**SETTINGS, "images": 1, "alone": False}
    (one,) = desk.generate([(str(anna), None)], None, **known)
    (plain,) = WebSession(tmp_path).generate([(str(anna), None)], None, **known)
    assert Image.open(one[0]).tobytes() != Image.open(plain[0]).tobytes()
    assert json.loads(Image.open(one[0]).info["openpulid"])["adapter"] == str(own)
    with pytest.raises(OptionError, match="levels are FLUX's"), web.open_app("mini", memory="12gb"):
        pass


def test_what_is_offered_is_what_is_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert {"mini", "mini-lightning"} <= set(installed_presets())
    files = {
        name: MINIATURE / MINI_BASELINES[name].get("adapter", f"{name}.safetensors")
        for name in MINI_BASELINES
    }
    assert installed_methods(mini()) == [
        "pulid",
        *(name for name in sorted(files) if files[name].exists()),
    ]
    assert missing_weights(mini()) == [] and missing_weights(mini(tmp_path))[0] == str(
        tmp_path / "pipeline"
    )
    lacking = missing_weights(sdxl())
    (tmp_path / "pulid_v1.1.safetensors").write_bytes(b"weights")
    assert set(lacking) - set(missing_weights(sdxl())) <= {
        "pulid-v1.1"
    } and "pulid-v1.1" not in missing_weights(sdxl())
    with pytest.raises(OptionError, match="mini-lightning"), web.open_app("sdxl-v1"):
        pass


def test_it_is_served_to_this_machine_alone_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: dict[str, Any] = {}
    monkeypatch.setattr("gradio.Blocks.launch", lambda blocks, **options: served.update(options))
    web_command()
    assert served["server_name"] == "127.0.0.1" and served["share"] is False
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with web.open_app("mini") as blocks:
        assert blocks.analytics_enabled is False and blocks.delete_cache == web.KEPT
        assert len(list(tmp_path.glob("openpulid-*"))) == 1
    assert not list(tmp_path.glob("openpulid-*"))
