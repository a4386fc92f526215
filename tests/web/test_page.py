"""The web page: requested over HTTP as a browser does, with the shipped miniature."""

from __future__ import annotations

import inspect
import logging
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

import httpx
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image

from openpulid.cli.web import web as web_command
from openpulid.errors import FaceError, IdentityError, ImageError, OptionError
from openpulid.identity.detection import MiniFaceDetection
from openpulid.identity.identity import Identity
from openpulid.io.hub import FOLDER_VARIABLE, WEIGHTS
from openpulid.io.images import open_image
from openpulid.pipelines.presets import (
    BASELINES,
    MINI_ADAPTERS,
    MINIATURE,
    mini,
    mini_lightning,
    sdxl,
    with_method,
)
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import GenerationRequest, IdentityOptions, ModelSelection
from openpulid.pipelines.request_inputs import Control, Person
from openpulid.pipelines.weights import (
    find_installed_controls,
    find_installed_methods,
    find_installed_presets,
    missing_weights,
)
from openpulid.web import page as web
from openpulid.web.form import FormValues, PreviewValues, adapt_message, image_paths
from openpulid.web.network import check_address, without_proxy
from openpulid.web.server import launch_options
from openpulid.web.session import WebSession
from openpulid.world.gallery import render_portrait
from tests.support.image_files import IMAGES

gradio = pytest.importorskip("gradio", reason="extra web is not installed", exc_type=ImportError)
from gradio.components.gallery import GalleryData, GalleryImage  # noqa: E402
from gradio.data_classes import FileData, ImageData  # noqa: E402

SETTINGS: dict[str, Any] = {
    "face_index": None,
    "prompt": "portrait, photo, smiling",
    "preset": "mini-lightning",
    "method": "pulid",
    "scale": 1.0,
    "num_images": 2,
    "seed": 3,
    "also_without_identity": True,
    "negative_prompt": "",
    "num_inference_steps": None,
    "guidance_scale": None,
    "size": "",
    "start": 0.0,
    "end": 1.0,
    "control": "",
    "control_image": None,
    "control_scale": 1.0,
}
ONE_IMAGE = {**SETTINGS, "num_images": 1, "also_without_identity": False}


def generate(session: WebSession, **values: Any) -> list[tuple[str, str]]:
    """Send the form to a session, as the page does."""
    given = {"reference_images": None, "identity_file": None, **ONE_IMAGE, **values}
    return web._generate(session, FormValues(**given))


def pixels(file: str) -> bytes:
    return Image.open(file).tobytes()


@pytest.fixture(scope="module")
def anna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("people") / "anna.png"
    render_portrait(1_000_007).save(file)
    return file


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from gradio_client import Client

    with web.open_app("mini") as blocks:
        _, url, _ = blocks.launch(
            server_port=free_port(), prevent_thread_lock=True, **launch_options("127.0.0.1")
        )
        yield Client(url, verbose=False)
        blocks.close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("http_proxy", "http://127.0.0.1:9"),
        ("HTTP_PROXY", "http://127.0.0.1:9"),
        ("ALL_PROXY", "socks5://127.0.0.1:9"),
        ("all_proxy", "no address"),
        ("SSL_CERT_FILE", "/none/certificates.pem"),
    ],
)
def test_page_opens_in_an_environment_for_the_internet(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """Gradio asks its own server for an answer: a proxy cannot reach it."""
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with without_proxy(), web.open_app("mini") as blocks:
        _, url, _ = blocks.launch(
            server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True
        )
        try:
            assert direct.open(url, timeout=30).status == 200
        finally:
            blocks.close()
    assert os.environ[name] == value and "NO_PROXY" not in os.environ


def test_other_websites_cannot_use_the_page(client: Any) -> None:
    address = client.src.removeprefix("http://").rstrip("/")
    port = address.rpartition(":")[2]
    cases = {
        (address, None): 200,
        (address, f"http://{address}"): 200,
        (f"localhost:{port}", f"http://localhost:{port}"): 200,
        (f"[::1]:{port}", None): 200,
        ("evil.example", None): 403,  # DNS rebinding
        (f"evil.example:{port}", f"http://evil.example:{port}"): 403,
        (address, "http://evil.example"): 403,
        (address, f"http://localhost:{port}"): 403,
        (address, "null"): 403,
        (address, "http://[evil"): 403,
        ("127.0.0.1.evil.example", None): 403,
        ("", None): 403,
    }
    for (host, origin), expected in cases.items():
        headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
        response = httpx.post(
            f"{client.src}gradio_api/upload", headers=headers, files={"files": ("a.png", b"photo")}
        )
        assert response.status_code == expected, (host, origin, response.text)
    assert httpx.get(client.src, headers={"Host": "evil.example"}).status_code == 403


def test_page_stores_and_sends_nothing(client: Any) -> None:
    assert client.config["run_history"] is False and client.config["footer_links"] == []
    assert client.config["analytics_enabled"] is False


@pytest.mark.parametrize("host", ["300.1.1.1", "192.0.2.1", "a..b"])
def test_host_of_another_machine_is_refused(host: str) -> None:
    with pytest.raises(OptionError, match=f"--host {re.escape(host)} is not an address of this"):
        check_address(host, free_port())


def test_port_in_use_is_refused() -> None:
    check_address("127.0.0.1", free_port())
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with pytest.raises(OptionError, match=f"port {port} is not available"):
            check_address("127.0.0.1", port)


def test_notes_are_shown_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr("gradio.Warning", notes.append)
    logger = logging.getLogger("openpulid.pipelines.prompts")

    def work(values: FormValues) -> str:
        visitor = threading.Thread(target=logger.warning, args=("of another visitor",))
        visitor.start()
        visitor.join()
        logger.warning("no effect: %s", "<lora:x:0.8>")
        return values.prompt

    handle = web._form_handler(work, FormValues)
    values = {"reference_images": None, "identity_file": None, **SETTINGS}
    assert handle(*[values[field.name] for field in fields(FormValues)]) == SETTINGS["prompt"]
    assert notes == ["no effect: &lt;lora:x:0.8&gt;"]
    logger.warning("after the request")
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("CUDA out of memory."), "choose a smaller size"),
        (ImportError("libGL.so.1: cannot open shared object file: none"), "apt install libgl1"),
    ],
)
def test_errors_of_libraries_are_explained_on_the_page(error: Exception, message: str) -> None:
    def fail(values: FormValues) -> None:
        raise error

    values = {"reference_images": None, "identity_file": None, **SETTINGS}
    with pytest.raises(gradio.Error, match=message):
        web._form_handler(fail, FormValues)(*[values[field.name] for field in fields(FormValues)])


def test_blank_fields_stand_for_the_preset() -> None:
    form = FormValues(reference_images=None, identity_file=None, **SETTINGS)
    request = form.to_request(ModelSelection(preset="mini"))
    assert request.negative_prompt is None
    assert request.identity == IdentityOptions()  # the sliders have no effect without a person


@pytest.mark.parametrize("seed", [1e23, 2**64])
def test_seed_out_of_range_is_one_sentence(client: Any, seed: float) -> None:
    with pytest.raises(Exception, match="Seed must be at most 18446744073709551615"):
        values = {**SETTINGS, "seed": seed}
        client.predict(reference_images=None, identity_file=None, **values, api_name="/generate")


@pytest.mark.parametrize(
    "change",
    [
        {"num_inference_steps": 10**7},
        {"num_inference_steps": 201},
        {"num_images": 65},
        {"num_images": 10**9},
        {"guidance_scale": 1e9},
        {"size": "100000x100000"},
        {"scale": 1e9},
    ],
)
def test_every_value_has_a_maximum(client: Any, change: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"at most|maximum"):
        client.predict(
            reference_images=None, identity_file=None, **SETTINGS | change, api_name="/generate"
        )


def as_gallery(file: Path) -> list[dict[str, Any]]:
    from gradio_client import handle_file

    return [{"image": handle_file(str(file)), "caption": None}]


def test_images_and_prompt_to_images_with_their_request(client: Any, anna: Path) -> None:
    # 0 is what the page sends for a number that the user has not changed
    values = {**SETTINGS, "face_index": 0, "num_inference_steps": 0, "guidance_scale": 0}
    results = client.predict(
        reference_images=as_gallery(anna), identity_file=None, **values, api_name="/generate"
    )
    assert [result["caption"] for result in results] == [
        "seed 3",
        "seed 3, no identity",
        "seed 4",
        "seed 4, no identity",
    ]
    images = [Image.open(result["image"]) for result in results]
    assert len({image.tobytes() for image in images}) == 4
    provenance = Provenance.read(results[2]["image"])
    request = provenance.request
    assert request.seed == 4 and request.people == (Person(images=["anna.png"]),)
    assert request.model == ModelSelection(preset="mini-lightning")
    assert (request.num_inference_steps, request.guidance_scale) == (4, 1.0)
    assert request.identity == mini_lightning().defaults.identity
    assert (request.width, request.height) == (96, 96)
    hashes = provenance.input_hashes
    assert set(hashes) == {"people.0.images.0"} and len(hashes["people.0.images.0"]) == 4
    assert provenance.restore({"people.0.images.0": anna}).people == (Person(images=[anna]),)
    assert Provenance.read(results[1]["image"]).request.people == ()


def test_random_person_is_previewed(client: Any) -> None:
    (person,) = client.predict(api_name="/person")
    assert Image.open(person["image"]).size == (96, 96)
    preview = client.predict(
        as_gallery(Path(person["image"])), None, None, "mini", "pulid", api_name="/faces"
    )
    assert Image.open(preview).width > 96


def test_no_number_is_empty() -> None:
    """Gradio shows an empty number as 0, so 0 must mean the preset's default."""
    with web.open_app("mini") as blocks:
        numbers = [block for block in blocks.blocks.values() if isinstance(block, gradio.Number)]
    assert len(numbers) == 5 and not [number.label for number in numbers if number.value is None]


def test_form_and_request_do_not_depend_on_order(anna: Path) -> None:
    values = {name: SETTINGS[name] for name in sorted(SETTINGS)}
    values |= {"num_inference_steps": 5.0, "guidance_scale": 2.0, "size": "96x64", "face_index": 1}
    form = FormValues(identity_file=None, reference_images=[(str(anna), None)], **values)
    request = form.to_request(ModelSelection(preset="mini"))
    assert request == GenerationRequest(
        prompt="portrait, photo, smiling",
        seed=3,
        num_images=2,
        width=96,
        height=64,
        num_inference_steps=5,
        guidance_scale=2.0,
        people=[Person(images=[anna], face_index=1)],
        identity=IdentityOptions(scale=1.0, start=0.0, end=1.0),
        model=ModelSelection(preset="mini"),
    )


def test_user_errors_are_shown_on_the_page(client: Any, anna: Path) -> None:
    with pytest.raises(Exception, match="does not know 'spaceship'"):
        values = {**SETTINGS, "prompt": "portrait, spaceship"}
        client.predict(
            reference_images=as_gallery(anna), identity_file=None, **values, api_name="/generate"
        )
    with pytest.raises(Exception, match="Prompt must not be empty"):
        values = {**SETTINGS, "prompt": " "}
        client.predict(
            reference_images=as_gallery(anna), identity_file=None, **values, api_name="/generate"
        )
    with pytest.raises(Exception, match="add reference images"):
        client.predict(None, None, None, "mini", "pulid", api_name="/faces")


def test_page_reads_images_as_the_command_line_does(tmp_path: Path, anna: Path) -> None:
    """No component of the page decodes an upload, which would drop alpha and profile."""
    with web.open_app("mini") as blocks:
        form = {block.label: block for block in blocks.blocks.values() if hasattr(block, "label")}
        upload = FileData(path=str(IMAGES / "alpha-control.png"))
        control_image = form["Control image; any image for control-edges"].preprocess(upload)
        assert open_image(control_image).getpixel((0, 0)) == (255, 255, 255)
        photo = copyfile(anna, tmp_path / "IMG0001")  # a photo without an ending
        uploads = GalleryData(root=[GalleryImage(image=ImageData(path=str(photo)))])
        reference_images = form["Reference images of one person"].preprocess(uploads)
    assert image_paths(reference_images) == [str(photo)]
    (result,) = generate(WebSession(tmp_path), reference_images=reference_images)
    (expected,) = generate(WebSession(tmp_path), reference_images=[(str(anna), None)])
    assert pixels(result[0]) == pixels(expected[0])


def test_uploads_are_decoded_in_a_child_process(
    tmp_path: Path, anna: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openpulid.web.session.DECODE_SECONDS", 0.001)
    session = WebSession(tmp_path)
    with pytest.raises(ImageError, match=r"anna\.png: takes longer than 0\.001 s to decode"):
        generate(session, reference_images=[(str(anna), None)])
    with pytest.raises(ImageError, match="takes longer"):
        session.preview([str(anna)], None, session.models)


def test_messages_name_uploads_and_buttons(tmp_path: Path) -> None:
    """Neither a temporary folder of the server nor a command appears on the page."""
    handle = web._form_handler(partial(web._generate, WebSession(tmp_path)), FormValues)
    folder = tmp_path / "gradio" / "0f3a"
    folder.mkdir(parents=True)
    empty = folder / "empty room.jpeg"
    Image.new("RGB", (96, 96), "gray").save(empty)
    (folder / "IMG_1.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "anna.safetensors").write_bytes(b"no identity")
    no_face = "empty room.jpeg: no face detected in its 96 x 96 pixels (one size: 96 pixels); this"
    no_face += " preset only detects one synthetic person per image (the button Random person"
    cases = {
        no_face: {"reference_images": [(str(empty), None)]},
        "IMG_1.heic: is": {"reference_images": [(str(folder / "IMG_1.heic"), None)]},
        "anna.safetensors is not an identity file; add the reference images instead.": {
            "identity_file": str(folder / "anna.safetensors")
        },
    }
    for message, values in cases.items():
        form = {"reference_images": None, "identity_file": None, **ONE_IMAGE, **values}
        with pytest.raises(gradio.Error) as error:
            handle(*(form[name] for name in inspect.signature(handle).parameters))
        assert error.value.message.startswith(message)
        assert str(tmp_path) not in error.value.message and "`pulid" not in error.value.message


def test_advice_of_the_command_line_becomes_advice_of_the_page() -> None:
    identity = Identity(torch.zeros(1, 1, 4), (torch.zeros(1, 2, 4),), {"vision": "a"})
    with pytest.raises(IdentityError, match="`pulid identify`") as error:
        identity.require({"vision": "b"})
    assert adapt_message(str(error.value), []) == (
        "this identity was created with other models (vision); add the reference images instead."
    )


def test_warnings_are_shown_on_the_page(
    tmp_path: Path, anna: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(gradio, "Warning", shown.append)
    transparent = tmp_path / "gradio" / "clear.png"
    transparent.parent.mkdir()
    Image.new("RGBA", (96, 96)).save(transparent)
    handle = web._form_handler(partial(web._preview, WebSession(tmp_path)), PreviewValues)
    with pytest.raises(gradio.Error, match="no face detected"):
        handle([(str(transparent), None)], None, None, "mini", "pulid")
    assert shown == ["clear.png: is transparent everywhere; it is read as white"]
    shown.clear()
    handle([(str(anna), None)], None, None, "mini", "pulid")
    assert shown == []


def test_same_image_is_analyzed_once_and_before_the_base_is_loaded(
    tmp_path: Path, anna: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detections: list[Any] = []
    detect = MiniFaceDetection.detect

    def count(detection: MiniFaceDetection, image: Any) -> Any:
        detections.append(session._studio)
        return detect(detection, image)

    monkeypatch.setattr(MiniFaceDetection, "detect", count)
    session = WebSession(tmp_path)
    session.preview([str(anna)], None, session.select_models("mini-lightning"))
    assert session._studio is None
    uploads = [(str(anna), None)]
    files = [generate(session, reference_images=uploads)[0][0] for _ in range(2)]
    copyfile(anna, tmp_path / "copy.png")  # as an upload of the same file
    files += [generate(session, reference_images=[(str(tmp_path / "copy.png"), None)])[0][0]]
    assert detections == [None, None] and len(set(map(pixels, files))) == 1
    render_portrait(1_000_011).save(tmp_path / "copy.png")  # another person under the same name
    (other,) = generate(session, reference_images=[(str(tmp_path / "copy.png"), None)])
    assert len(detections) == 3 and pixels(other[0]) != pixels(files[0])


def test_warnings_are_shown_without_paths_of_the_server(
    tmp_path: Path, anna: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(gradio, "Warning", shown.append)
    Image.open(anna).rotate(180).save(tmp_path / "turned.png")
    session = WebSession(tmp_path)
    handler = web._form_handler(partial(web._preview, session), PreviewValues)
    handler([(str(tmp_path / "turned.png"), None)], None, None, "mini", "pulid")
    assert shown == [
        "turned.png: the face is not upright; it is read after turning by 180 degrees."
    ]


def test_session_has_one_studio_at_a_time(tmp_path: Path, anna: Path) -> None:
    session = WebSession(tmp_path)
    models = session.select_models("mini-lightning")
    studio = session.studio(models)
    assert session.studio(models) is studio
    file = str(tmp_path / "anna.safetensors")
    studio.identify([str(anna)]).save(file)
    empty = {"size": None, "negative_prompt": None}  # as a browser sends empty fields
    uploads = [(str(anna), None)]
    (one,) = generate(session, identity_file=file, **empty)
    (other,) = generate(session, reference_images=uploads, **empty)
    assert pixels(one[0]) == pixels(other[0])
    with pytest.raises(OptionError, match="either images or an identity file, not both"):
        generate(session, reference_images=uploads, identity_file=file)
    with pytest.raises(FaceError, match="no face 1"):
        generate(session, reference_images=uploads, face_index=1)
    with pytest.raises(OptionError, match="cannot be used with an identity file"):
        generate(session, identity_file=file, face_index=1)
    with pytest.raises(OptionError, match="prompt must not be empty"):
        generate(session, prompt=" ")
    assert session.studio(session.select_models("mini")) is not studio


def test_controlnet_with_a_person(
    tmp_path: Path, anna: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = WebSession(tmp_path)
    torch.manual_seed(0)
    studio = session.studio(session.select_models("mini-lightning"))
    net = ControlNetModel.from_unet(studio.pipe.unet)
    for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(layer.weight, std=0.05)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_installed_controls() == []
    net.save_pretrained(tmp_path / WEIGHTS["control-edges"].repo.split("/")[-1])
    assert find_installed_controls() == ["control-edges"]
    person = {"reference_images": [(str(anna), None)]}
    control = {"control": "control-edges", "control_image": str(anna), "control_scale": 0.5}
    (plain,) = generate(session, **person)
    (controlled,) = generate(session, **person, **control)
    (again,) = generate(session, **person)
    assert pixels(controlled[0]) != pixels(plain[0]) == pixels(again[0])
    request = Provenance.read(controlled[0]).request
    assert request.controls == (Control("control-edges", "anna.png", scale=0.5),)
    with pytest.raises(OptionError, match=r"controls\.0\.model is missing"):
        generate(session, **person, control_image=str(anna))


def test_changes_apply_to_the_first_preset_alone(tmp_path: Path, anna: Path) -> None:
    adapter = Path(
        copyfile(MINIATURE / "pulid-stage1.safetensors", tmp_path / "adapter.safetensors")
    )

    def changed(preset: str) -> WebSession:
        return WebSession(tmp_path, models=ModelSelection(preset=preset, adapter=adapter))

    session = changed("mini-lightning")
    first = session.preset(session.models)
    assert first.models.adapter == adapter
    assert {"pulid", "faceid"} <= set(find_installed_methods(first))
    assert find_installed_methods(first) == find_installed_methods(mini_lightning())
    full = changed("sdxl")
    sdxl_preset = full.preset(full.models)
    assert sdxl_preset.models.adapter == adapter
    for name in BASELINES:
        assert with_method(sdxl_preset, name).models == with_method(sdxl(), name).models
    other = session.preset(session.select_models("mini"))
    assert other.models.adapter == mini().models.adapter
    faceid = session.preset(session.select_models("mini-lightning", "faceid"))
    assert faceid.models.adapter == MINIATURE / "faceid.safetensors"
    person = {"reference_images": [(str(anna), None)]}
    (own,) = generate(session, **person)
    (plain,) = generate(WebSession(tmp_path), **person)
    assert pixels(own[0]) != pixels(plain[0])
    assert Provenance.read(own[0]).request.model.adapter == "adapter.safetensors"
    with (
        pytest.raises(OptionError, match="only available for FLUX presets"),
        web.open_app("mini", memory="12gb"),
    ):
        pass


def test_only_installed_models_are_offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert {"mini", "mini-lightning"} <= set(find_installed_presets())
    files = {name: MINIATURE / file for name, file in MINI_ADAPTERS.items()}
    trained = [name for name in sorted(files) if files[name].exists()]
    assert find_installed_methods(mini()) == ["pulid", *trained]
    assert missing_weights(mini()) == []
    assert missing_weights(mini(tmp_path))[0] == str(tmp_path / "pipeline")
    missing = missing_weights(sdxl())
    (tmp_path / "pulid_v1.1.safetensors").write_bytes(b"weights")
    assert set(missing) - set(missing_weights(sdxl())) <= {"pulid-v1.1"}
    assert "pulid-v1.1" not in missing_weights(sdxl())
    with pytest.raises(OptionError, match="mini-lightning"), web.open_app("sdxl-v1"):
        pass


def test_page_is_served_locally_and_leaves_no_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    served: dict[str, Any] = {}
    monkeypatch.setattr("gradio.Blocks.launch", lambda blocks, **options: served.update(options))
    web_command()
    assert served["server_name"] == "127.0.0.1" and served["share"] is False
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with web.open_app("mini") as blocks:
        assert blocks.analytics_enabled is False and blocks.delete_cache == web.DELETE_CACHE
        (directory,) = tmp_path.glob("openpulid-*")
        assert directory.stat().st_mode & 0o777 == 0o700
        uploads = os.environ["GRADIO_TEMP_DIR"]
        assert Path(uploads).parent == directory
        caches = {getattr(block, "GRADIO_CACHE", uploads) for block in blocks.blocks.values()}
        assert caches == {uploads}
    assert os.environ.get("GRADIO_TEMP_DIR") != uploads and os.listdir(tmp_path) == []
