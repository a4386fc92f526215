"""The web page: requested over HTTP as a browser does, with the shipped miniature."""

from __future__ import annotations

import html
import logging
import os
import re
import socket
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfile
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from openpulid.cli.web import web as web_command
from openpulid.errors import FaceError, IdentityError, ImageError, OptionError
from openpulid.identity.detection import MiniFaceDetection
from openpulid.identity.identity import Identity
from openpulid.io.hub import FOLDER_VARIABLE
from openpulid.io.images import open_image
from openpulid.io.serving import check_address
from openpulid.methods.registry import TUNED_METHODS, UNPUBLISHED_METHODS
from openpulid.pipelines.baselines import BASELINES
from openpulid.pipelines.model_set import MINI_ADAPTERS
from openpulid.pipelines.presets import MINIATURE, PRESETS, mini, mini_lightning, sdxl
from openpulid.pipelines.provenance import Provenance
from openpulid.pipelines.request import (
    GenerationRequest,
    IdentityOptions,
    ModelSelection,
    parse_size,
)
from openpulid.pipelines.request_inputs import InitImage, Person
from openpulid.pipelines.selection import with_method
from openpulid.pipelines.weights import (
    find_installed_methods,
    find_installed_presets,
    missing_weights,
)
from openpulid.web import page as web
from openpulid.web import prompts
from openpulid.web.about import describe_preset
from openpulid.web.fields import FIELDS
from openpulid.web.form import FormValues, image_paths
from openpulid.web.generation import generate_images
from openpulid.web.history import MAX_KEPT, History
from openpulid.web.inputs import draw_faces
from openpulid.web.labels import adapt_message
from openpulid.web.messages import error_html
from openpulid.web.network import without_proxy
from openpulid.web.notes import show_notes
from openpulid.web.restore import _find_preset
from openpulid.web.results import show_images, zip_images
from openpulid.web.server import launch_options
from openpulid.web.session import WebSession
from openpulid.web.sizes import list_sizes
from openpulid.web.updates import PageImage, Step
from openpulid.world import VOCABULARY
from openpulid.world.gallery import render_portrait
from tests.support.image_files import IMAGES

gradio = pytest.importorskip("gradio", reason="extra web is not installed", exc_type=ImportError)
from gradio.components.gallery import GalleryData, GalleryImage  # noqa: E402
from gradio.components.image_editor import EditorData  # noqa: E402
from gradio.data_classes import FileData, ImageData  # noqa: E402
from gradio.processing_utils import save_file_to_cache  # noqa: E402
from gradio_client import handle_file  # noqa: E402

from openpulid.web.components import Page, build_field  # noqa: E402
from openpulid.web.events import DELETE_CACHE  # noqa: E402
from openpulid.web.generation_events import stop_generation  # noqa: E402
from openpulid.web.layout import build_layout  # noqa: E402
from openpulid.web.people import preview_faces  # noqa: E402
from openpulid.web.run import run_generation  # noqa: E402
from openpulid.web.settings import restore_settings  # noqa: E402
from tests.web.page_support import (  # noqa: E402
    SETTINGS,
    build_request,
    click,
    draw,
    free_port,
    generate,
    message_of,
    pixels,
    run_page,
)


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    from gradio_client import Client

    with web.open_app("mini") as blocks:
        _, url, _ = blocks.launch(
            server_port=free_port(), prevent_thread_lock=True, **launch_options("127.0.0.1")
        )
        yield Client(url, verbose=False)
        blocks.close()


def call(client: Any, **values: Any) -> tuple[list[dict[str, Any]], str, str]:
    """Generate over HTTP; return the images of the gallery, the message and the archive."""
    api = client.view_api(print_info=False, return_format="dict")
    empty = {
        parameter["parameter_name"]: None
        for parameter in api["named_endpoints"]["/generate"]["parameters"]
        if not parameter["parameter_has_default"]
    }
    gallery, message, *_, archive = client.predict(
        **{**empty, **SETTINGS, **values}, api_name="/generate"
    )
    return gallery.get("value", []), message, archive


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


def test_notes_are_shown_on_the_page(tmp_path: Path) -> None:
    updates = run_page(WebSession(tmp_path), prompt="portrait, {smiling}")
    assert "Syntax of other programs has no effect in the prompt" in message_of(updates)
    assert '<div class="status" role="status">1 image in' in message_of(updates)
    escaped = error_html("no effect: <lora:x:0.8>")
    assert "No effect: &lt;lora:x:0.8&gt;." in escaped


def test_notes_of_other_visitors_are_not_shown() -> None:
    notes: list[str] = []
    logger = logging.getLogger("openpulid.pipelines.prompts")
    with show_notes(notes.append):
        visitor = threading.Thread(target=logger.warning, args=("of another visitor",))
        visitor.start()
        visitor.join()
        logger.warning("no effect")
    logger.warning("after the request")
    assert notes == ["no effect"]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("CUDA out of memory."), "choose a smaller size"),
        (ImportError("libGL.so.1: cannot open shared object file: none"), "apt install libgl1"),
    ],
)
def test_errors_of_libraries_are_explained_on_the_page(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    session = WebSession(tmp_path)
    monkeypatch.setattr("openpulid.web.submit.generate_images", fail)
    assert message in message_of(run_page(session))


def test_bug_is_shown_and_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    session = WebSession(tmp_path)
    monkeypatch.setattr("openpulid.web.submit.generate_images", fail)
    with gradio.Blocks():
        page = build_layout(session)
    updates = run_generation(session, page, SETTINGS, lambda *_, **__: None)
    assert "An unexpected error" in next(updates)[page.parts["message"]]
    with pytest.raises(ZeroDivisionError):
        next(updates)


def test_values_of_the_preset_are_left_out(tmp_path: Path) -> None:
    session = WebSession(tmp_path)
    shown = {entry.name: entry.default(sdxl()) for entry in FIELDS}
    request = FormValues({**shown, "prompt": "portrait", "preset": "sdxl"}).to_request(
        sdxl(), tmp_path
    )
    assert request.list_options() == []  # the options have no effect without a person
    request = build_request(session, tmp_path, negative_prompt="", size="", scale=0.5)
    assert request.list_options() == []
    changed = {**shown, "prompt": "portrait", "negative_prompt": "", "guidance_scale": 5}
    request = FormValues(changed).to_request(sdxl(), tmp_path)
    assert request.list_options() == ["negative_prompt", "guidance_scale"]
    assert request.negative_prompt == ""


@pytest.mark.parametrize("preset", PRESETS)
def test_every_option_of_a_preset_has_a_component(preset: str) -> None:
    """No component is empty: Gradio shows an empty number as 0."""
    built = PRESETS[preset]()
    with gradio.Blocks():
        components = [build_field(entry, built) for entry in FIELDS]
    for entry, component in zip(FIELDS, components, strict=True):
        assert component.visible == entry.is_supported(built)
        assert component.value is not None
    without = {"width", "height", "memory", "controls"}
    without |= {"loras", "embeddings", "style_image"}  # of several files
    assert built.options - without <= {entry.name for entry in FIELDS}


@pytest.mark.parametrize(
    ("seed", "expected"), [("18446744073709551615", 2**64 - 1), (" 7 ", 7), ("0", 0)]
)
def test_seed_is_text(tmp_path: Path, seed: str, expected: int) -> None:
    """A browser rounds integers above 2^53."""
    assert build_request(WebSession(tmp_path), tmp_path, seed=seed).seed == expected


def test_deleted_number_is_the_default(tmp_path: Path) -> None:
    deleted = {"num_images": None, "num_inference_steps": None, "refine_strength": None}
    request = build_request(WebSession(tmp_path), tmp_path, **deleted, refine_faces=True)
    assert request.num_images == 4 and request.num_inference_steps is None
    unchanged = build_request(WebSession(tmp_path), tmp_path, refine_faces=True)
    assert request.refine_faces == unchanged.refine_faces


def test_seed_is_random_by_default(tmp_path: Path) -> None:
    session = WebSession(tmp_path)
    seeds = {
        build_request(session, tmp_path, seed=seed).seed
        for seed in ("random", "Random", "", "-1", None)
    }
    assert len(seeds) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": "18446744073709551616"}, "Seed must be at most 18446744073709551615"),
        ({"seed": "1e5"}, "Seed must be a whole number, got '1e5'"),
        ({"num_inference_steps": 201}, "Steps must be at most 200 on this page, got 201"),
        ({"num_inference_steps": 0}, "Steps must be at least 1 on this page, got 0"),
        ({"num_images": 65}, "Images must be at most 64"),
        ({"guidance_scale": 1e9}, "Guidance must be at most 100"),
        ({"size": "100000x100000"}, "at most 4096"),
        ({"size": "large"}, "expected WIDTHxHEIGHT"),
        ({"prompt": " "}, "Prompt must not be empty"),
        ({"mode": "edit"}, "Image to edit is missing"),
    ],
)
def test_value_out_of_range_is_one_sentence(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shown = re.sub(r"<[^>]+>", "", message_of(run_page(WebSession(tmp_path), **change)))
    assert message.lower() in shown.lower() and shown.count(". ") == 0


def as_gallery(file: Path) -> list[dict[str, Any]]:
    from gradio_client import handle_file

    return [{"image": handle_file(str(file)), "caption": None}]


def test_images_and_prompt_to_images_with_their_request(client: Any, anna: Path) -> None:
    results, message, _ = call(
        client, reference_images=as_gallery(anna), num_images=2, also_without_identity=True
    )
    assert "4 images in" in message and "seeds 3 to 4" in message
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


def test_stopped_generation_keeps_what_is_finished(tmp_path: Path, anna: Path) -> None:
    session = WebSession(tmp_path)
    request = build_request(session, tmp_path, num_images=3, reference_images=[(str(anna), None)])
    reported: list[Any] = []

    def report(update: Any) -> None:
        reported.append(update)
        if isinstance(update, PageImage):
            session.stop("first")

    images = generate_images(session, request, True, report, "first")
    assert [image.seed for image in images] == [3] and Path(images[0].file).exists()
    assert [(step.done, step.total) for step in reported if isinstance(step, Step)] == [
        (1, 24), (2, 24), (3, 24), (4, 24)
    ]  # fmt: skip
    assert generate_images(session, request, job="first") == []  # stopped while it waited
    assert len(generate_images(session, request, job="second")) == 3


@pytest.mark.parametrize("has_history", [True, False])
def test_files_of_old_runs_are_kept_for_the_history(tmp_path: Path, has_history: bool) -> None:
    session = WebSession(tmp_path, has_history=has_history)
    old, recent = session.make_folder(), session.make_folder()
    (old / "image.png").write_bytes(b"")
    os.utime(old, (time.time() - 3700,) * 2)
    session.make_folder()
    assert recent.exists() and old.exists() == has_history


def test_stopped_before_the_first_image_keeps_the_old_ones(tmp_path: Path) -> None:
    session = WebSession(tmp_path)
    session.stop("waiting")
    (updates,) = run_page(session, job="waiting")
    assert "Stopped before the first image" in updates["message"] and "gallery" not in updates


def test_stopped_run_leaves_the_queue_only_while_it_waits(tmp_path: Path) -> None:
    session = WebSession(tmp_path)
    run_page(session, job="first")
    assert stop_generation(session, "first") == gradio.skip()  # it ends after its present step
    assert stop_generation(session, "waiting") == "waiting" and session.is_stopped("waiting")


def test_preview_while_generating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openpulid.web.updates.PREVIEW_SECONDS", 0.0)
    updates = run_page(WebSession(tmp_path), num_images=2)
    previews = [update["live"].constructor_args for update in updates if "live" in update]
    assert len(previews) == 9 and all(entry["value"].size == (96, 96) for entry in previews[:8])
    assert previews[-1] == {"value": None, "visible": False}
    assert [len(u["gallery"].constructor_args["value"]) for u in updates if "gallery" in u] == [
        1, 2, 2
    ]  # fmt: skip


def test_visitor_who_leaves_stops_the_generation(tmp_path: Path) -> None:
    session = WebSession(tmp_path)
    with gradio.Blocks():
        page = build_layout(session)
    updates = run_generation(
        session, page, {**SETTINGS, "num_images": 60, "job": "gone"}, lambda *_, **__: None
    )
    next(updates)
    updates.close()
    assert session.is_stopped("gone")
    assert len(list(tmp_path.glob("*/*.png"))) < 10


def test_archive_has_all_images(client: Any) -> None:
    _, _, archive = call(client, num_images=2)
    with zipfile.ZipFile(archive) as opened:
        assert opened.namelist() == [f"portrait-photo-smiling-{seed}.png" for seed in (3, 4)]


def test_invented_person_is_previewed_and_saved(client: Any) -> None:
    (person,) = client.predict(api_name="/person")
    assert Image.open(person["image"]).size == (96, 96)
    uploads = as_gallery(Path(person["image"]))
    preview, message = client.predict(
        reference_images=uploads, identity_file=None, api_name="/faces"
    )
    assert Image.open(preview["value"]).width > 96 and "Faces detected." in message
    button, _ = client.predict(reference_images=uploads, identity_file=None, api_name="/identity")
    saved = Path(button["value"])
    assert saved.suffix == ".safetensors"
    (one,), *_ = call(client, preset="mini", num_inference_steps=2, reference_images=uploads)
    (other,), *_ = call(
        client,
        preset="mini",
        num_inference_steps=2,
        identity_file=handle_file(str(saved)),
    )
    assert pixels(one["image"]) == pixels(other["image"])


def test_form_and_request(tmp_path: Path, anna: Path) -> None:
    request = build_request(
        WebSession(tmp_path),
        tmp_path,
        preset="mini",
        reference_images=[(str(anna), None)],
        face_index=1,
        num_images=2,
        num_inference_steps=5.0,
        guidance_scale=2.0,
        size="96x64",
        projection="ortho",
    )
    assert request == GenerationRequest(
        prompt="portrait, photo, smiling",
        seed=3,
        num_images=2,
        width=96,
        height=64,
        num_inference_steps=5,
        guidance_scale=2.0,
        people=[Person(images=[anna], face_index=1)],
        identity=IdentityOptions(scale=1.0, projection="ortho"),
        model=ModelSelection(preset="mini"),
    )


def test_edit_changes_only_what_is_painted(tmp_path: Path, anna: Path) -> None:
    session = WebSession(tmp_path)
    painted = draw(tmp_path / "layer.png", paint=(0, 0, 100, 30))
    canvas = {**painted, "background": str(anna)}
    edit = {"mode": "edit", "strength": 0.8, "resize": "crop"}
    (image,) = generate(session, edit_image=canvas, **edit)
    assert image.before is not None
    original, result = (np.array(Image.open(file)) for file in (image.before, image.file))
    assert (original[32:] == result[32:]).all() and (original[:28] != result[:28]).mean() > 0.5
    request = Provenance.read(image.file).request
    assert request.init_image == InitImage("anna.png", strength=0.8, mask="mask-1.png")
    plain = {"background": str(anna), "layers": [], "composite": None}
    (image,) = generate(session, edit_image=plain, **edit)
    assert (np.array(Image.open(image.file)) != original).mean() > 0.5


def test_settings_of_an_image_are_restored(tmp_path: Path, anna: Path) -> None:
    session = WebSession(tmp_path)
    values = {
        "mode": "people",
        "person1_reference_images": [(str(anna), None)],
        "person2_reference_images": [(str(anna), None)],
        "person2_region": "upper half",
        "person2_scale": 0.5,
        "num_inference_steps": 3,
        "seed": str(2**64 - 1),
        "start": 0.25,
    }
    (image,) = generate(session, **values)
    with gradio.Blocks():
        page = build_layout(session)
    updates = restore_settings(session, page, image.file)

    def shown(name: str) -> Any:
        update = updates[page.values[name]]
        return update["value"] if isinstance(update, dict) else update

    size = updates[page.values["size"]]
    assert size["value"] == "96x96" and ("Square: 96 x 96", "96x96") in size["choices"]
    for name in ("mode", "prompt", "preset", "seed", "num_inference_steps", "start"):
        assert shown(name) == {**SETTINGS, **values}[name]
    assert shown("person1_region") == "side by side" and shown("person2_region") == "upper half"
    assert shown("person2_scale") == "0.5"
    message = updates[page.parts["message"]]
    assert "Add the same files again: anna.png." in message
    # nothing is opened because an image names it, and other files would give another image
    assert updates[page.values["loras"]] is updates[page.values["second_control_image"]] is None
    assert page.values["person1_reference_images"] not in updates


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter": "own.safetensors"}, "an adapter of its own"),
        ({"base": "my-checkpoint"}, "another base model"),
        ({"face_pack": "open"}, "other face models"),
    ],
)
def test_models_of_another_page_are_refused(
    tmp_path: Path, change: dict[str, str], words: str
) -> None:
    model = ModelSelection(preset="mini", **change)
    provenance = Provenance.create(GenerationRequest("portrait", model=model), {})
    with pytest.raises(OptionError, match=f"{words}, which this page does not have"):
        _find_preset(WebSession(tmp_path), provenance)


def test_images_of_a_run_replace_the_previous_ones_at_once(tmp_path: Path) -> None:
    names = ("gallery", "welcome", "images", "selected", "live", "actions", "compare")
    page = Page(mini(), parts={name: name for name in (*names, "download_all")})
    first, second = (PageImage(str(tmp_path / f"{k}.png"), k, "") for k in (1, 2))
    for image in (first, second):
        Path(image.file).touch()
    updates = show_images(page, [first])
    assert updates["images"] == [first] and updates["selected"] == 0
    updates = show_images(page, [first, second])
    assert updates["images"] == [first, second] and "selected" not in updates


def test_history_shows_only_own_images(tmp_path: Path) -> None:
    """They are deleted with everything else in the folders of their runs."""
    files = [tmp_path / f"run{k // 2}" / f"{k}.png" for k in range(MAX_KEPT + 1)]
    files += [tmp_path / "ben" / "ben.png"]
    history = History(is_on=True, uploads=tmp_path / "uploads")
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.touch()
        zip_images([PageImage(str(file), 1, "")])
        history.add(file.stem if file.stem == "ben" else "anna", PageImage(str(file), 1, ""))
    *files, of_ben = files
    assert [image.file for image in history.images("anna")] == [
        str(file) for file in reversed(files[1:])
    ]
    assert history.images(None) == history.images("") == []
    # the archive of the first run has the image that is too old
    assert [file.name for file in files[0].parent.iterdir()] == ["1.png"]
    history.clear("anna")
    assert history.images("anna") == [] and list(tmp_path.iterdir()) == [of_ben.parent]
    assert len(history.images("ben")) == 1 and len(list(of_ben.parent.iterdir())) == 2
    off = History(is_on=False, uploads=tmp_path)
    off.add("anna", PageImage("anna.png", 1, ""))
    assert off.images("anna") == []


def test_delete_all_removes_copies_and_results(tmp_path: Path) -> None:
    session = WebSession(tmp_path, has_history=True)
    upload = tmp_path / "uploads" / "0" / "image.png"
    file = tmp_path / "run" / "image.png"
    for path, content in ((upload, b"another image"), (file, b"an image")):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    copy = Path(save_file_to_cache(file, str(tmp_path / "uploads")))
    session.history.add("anna", PageImage(str(file), 1, ""))
    updates = click(session, "clear", "anna")
    assert not file.exists() and not copy.exists() and upload.exists()
    assert updates["past"] == updates["past_images"] == updates["images"] == []
    assert not updates["gallery"].visible and not updates["actions"].visible


def test_delete_all_while_images_are_generated(tmp_path: Path) -> None:
    session = WebSession(tmp_path, has_history=True)
    with gradio.Blocks():
        page = build_layout(session)
    values = {**SETTINGS, "preset": "mini", "num_images": 2, "visitor": "anna"}
    message = ""
    for updates in run_generation(session, page, values, lambda *_, **__: None):
        if len(updates.get(page.parts["images"], [])) == 1:
            session.history.clear("anna")
        message = updates.get(page.parts["message"], message)
    assert 'class="status"' in message
    remaining = updates.get(page.parts["images"], [])
    assert all(Path(image.file).exists() for image in remaining) and len(remaining) < 2


def test_edited_image_is_not_masked_by_the_file_of_another(tmp_path: Path) -> None:
    updates = click(WebSession(tmp_path), "edit_this", [PageImage("image.png", 1, "")], 0)
    assert updates["edit_image"]["background"] == "image.png"
    assert updates["mode"] == "edit" and updates["edit_mask"] is None


def test_invented_person_is_generated_from_every_tab(tmp_path: Path) -> None:
    updates = click(WebSession(tmp_path), "start")
    assert updates["mode"] == "create" and updates["tabs"].selected == "create"
    assert Image.open(updates["reference_images"][0]).size == (96, 96)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False)],
)
def test_history_is_off_for_other_machines(
    host: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_history: list[bool] = []

    def launch(blocks: Any, **options: Any) -> None:
        has_history.append("History" in [getattr(b, "label", "") for b in blocks.blocks.values()])

    monkeypatch.setattr("gradio.Blocks.launch", launch)
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda blocks: None)
    web_command(host=host, port=0)
    web_command(host=host, port=0, history=not expected)
    assert has_history == [expected, not expected]


def test_words_are_those_of_the_miniature() -> None:
    texts = [*prompts.MINI_EXAMPLES, prompts.DEFAULT_PROMPT]
    texts += [phrase for phrases in prompts.list_topics().values() for phrase in phrases]
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    assert words <= set(VOCABULARY)


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes_suit_the_preset(preset: str) -> None:
    built = PRESETS[preset]()
    sizes = [parse_size(size) for _, size in list_sizes(built)]
    assert (built.models.native_side, built.models.native_side) in sizes and len(sizes) > 4
    for width, height in sizes:
        request = GenerationRequest(prompt="a", width=width, height=height)
        assert built.describe_ineffective(built.resolve(request), False) == []


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_described(preset: str) -> None:
    built = PRESETS[preset]()
    text = describe_preset(built)
    assert built.description in text and "Licenses" in text
    assert ("GiB" in text) == ("memory" in built.options)
    assert ("moustache" in text) == built.models.is_miniature
    assert ("commercial use" in text) == bool(built.published)


def test_user_errors_are_shown_on_the_page(client: Any, anna: Path) -> None:
    _, message, _ = call(client, prompt="portrait, spaceship", reference_images=as_gallery(anna))
    assert "does not know 'spaceship'" in message and "`pulid" not in message
    _, message = client.predict(reference_images=None, identity_file=None, api_name="/faces")
    assert "Add reference images" in message


def test_page_reads_images_as_the_command_line_does(tmp_path: Path, anna: Path) -> None:
    """No component of the page decodes an upload, which would drop alpha and profile."""
    with web.open_app("mini") as blocks:
        form = {block.label: block for block in blocks.blocks.values() if hasattr(block, "label")}
        upload = FileData(path=str(IMAGES / "alpha-control.png"))
        control_image = form["Image of the ControlNet"].preprocess(upload)
        assert open_image(control_image).getpixel((0, 0)) == (255, 255, 255)
        photo = copyfile(anna, tmp_path / "IMG0001")  # a photo without an ending
        uploads = GalleryData(root=[GalleryImage(image=ImageData(path=str(photo)))])
        reference_images = form["Reference images of one person"].preprocess(uploads)
        part = form["Drawn regions"].preprocess(EditorData(background=upload, layers=[upload]))
        blob = form["Image to edit"].convert_and_format_image(b"not an image")
    assert part["layers"] == [upload.path] and part["background"] == upload.path
    assert Path(blob).suffix == ".png"
    assert image_paths(reference_images) == [str(photo)]
    (result,) = generate(WebSession(tmp_path), reference_images=reference_images)
    (expected,) = generate(WebSession(tmp_path), reference_images=[(str(anna), None)])
    assert pixels(result) == pixels(expected)


def test_uploads_are_decoded_in_a_child_process(
    tmp_path: Path, anna: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openpulid.web.inputs.DECODE_SECONDS", 0.001)
    session = WebSession(tmp_path)
    with pytest.raises(ImageError, match=r"anna\.png: takes longer than 0\.001 s to decode"):
        generate(session, reference_images=[(str(anna), None)])
    with pytest.raises(ImageError, match="takes longer"):
        draw_faces(session, Person(images=[anna]), session.models)


def test_messages_name_uploads_and_buttons(tmp_path: Path) -> None:
    """Neither a temporary folder of the server nor a command appears on the page."""
    folder = tmp_path / "gradio" / "0f3a"
    folder.mkdir(parents=True)
    empty = folder / "empty room.jpeg"
    Image.new("RGB", (96, 96), "gray").save(empty)
    (folder / "IMG_1.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (folder / "anna.safetensors").write_bytes(b"no identity")
    no_face = "empty room.jpeg: no face detected in its 96 x 96 pixels (at 96 pixels, in four "
    no_face += (
        "orientations); this preset only detects synthetic people (the button Invent a person"
    )
    cases = {
        no_face: {"reference_images": [(str(empty), None)]},
        "IMG_1.heic: is": {"reference_images": [(str(folder / "IMG_1.heic"), None)]},
        "anna.safetensors is not an identity file; add the reference images instead.": {
            "identity_file": str(folder / "anna.safetensors")
        },
    }
    for message, values in cases.items():
        shown = html.unescape(message_of(run_page(WebSession(tmp_path), **values)))
        assert shown.startswith(f'<div class="error" role="alert">{message}')
        assert str(tmp_path) not in shown and "`pulid" not in shown


def test_advice_of_the_command_line_becomes_advice_of_the_page() -> None:
    identity = Identity(torch.zeros(1, 1, 4), (torch.zeros(1, 2, 4),), {"vision": "a"})
    with pytest.raises(IdentityError, match="`pulid identify`") as error:
        identity.require({"vision": "b"})
    assert adapt_message(str(error.value), []) == (
        "this identity was created with other models (vision); add the reference images instead."
    )


def test_warnings_are_shown_without_paths_of_the_server(tmp_path: Path, anna: Path) -> None:
    session = WebSession(tmp_path)
    with gradio.Blocks():
        page = build_layout(session)

    def preview(file: Path) -> str:
        values = {**SETTINGS, "reference_images": [(str(file), None)]}
        updates = preview_faces(session, page, "", values)
        return str(updates[page.parts["message"]])

    transparent = tmp_path / "gradio" / "clear.png"
    transparent.parent.mkdir()
    Image.new("RGBA", (96, 96)).save(transparent)
    shown = preview(transparent)
    assert "no face detected" in shown and str(tmp_path) not in shown
    assert "clear.png: is transparent everywhere; it is read as white." in shown
    Image.open(anna).rotate(180).save(tmp_path / "turned.png")
    assert (
        "turned.png: the face is not upright; it is read after turning by 180 degrees."
        in preview(tmp_path / "turned.png")
    )
    assert preview(anna) == '<div class="status" role="status">Faces detected.</div>'


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
    draw_faces(session, Person(images=[anna]), session.select_models("mini-lightning"))
    assert session._studio is None
    uploads = [(str(anna), None)]
    files = [generate(session, reference_images=uploads)[0] for _ in range(2)]
    copyfile(anna, tmp_path / "copy.png")  # as an upload of the same file
    files += generate(session, reference_images=[(str(tmp_path / "copy.png"), None)])
    assert detections == [None, None] and len(set(map(pixels, files))) == 1
    render_portrait(1_000_011).save(tmp_path / "copy.png")  # another person under the same name
    (other,) = generate(session, reference_images=[(str(tmp_path / "copy.png"), None)])
    assert len(detections) == 3 and pixels(other) != pixels(files[0])


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
    assert pixels(one) == pixels(other)
    with pytest.raises(OptionError, match="either images or an identity file, not both"):
        generate(session, reference_images=uploads, identity_file=file)
    with pytest.raises(FaceError, match="no face 1"):
        generate(session, reference_images=uploads, face_index=1)
    with pytest.raises(OptionError, match="cannot be used with an identity file"):
        generate(session, identity_file=file, face_index=1)
    with pytest.raises(OptionError, match="prompt must not be empty"):
        generate(session, prompt=" ")
    assert session.studio(session.select_models("mini")) is not studio


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
    for name, baseline in BASELINES.items():
        if baseline.family != "sdxl" or name in (*TUNED_METHODS, *UNPUBLISHED_METHODS):
            continue
        assert with_method(sdxl_preset, name).models == with_method(sdxl(), name).models
    other = session.preset(session.select_models("mini"))
    assert other.models.adapter == mini().models.adapter
    faceid = session.preset(session.select_models("mini-lightning", "faceid"))
    assert faceid.models.adapter == MINIATURE / "faceid.safetensors"
    person = {"reference_images": [(str(anna), None)]}
    (own,) = generate(session, **person)
    (plain,) = generate(WebSession(tmp_path), **person)
    assert pixels(own) != pixels(plain)
    assert Provenance.read(own.file).request.model.adapter == "adapter.safetensors"
    with (
        pytest.raises(OptionError, match="has no memory levels"),
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
        assert blocks.analytics_enabled is False and blocks.delete_cache == DELETE_CACHE
        (directory,) = tmp_path.glob("openpulid-*")
        assert directory.stat().st_mode & 0o777 == 0o700
        uploads = os.environ["GRADIO_TEMP_DIR"]
        assert Path(uploads).parent == directory
        caches = {getattr(block, "GRADIO_CACHE", uploads) for block in blocks.blocks.values()}
        assert caches == {uploads}
        (directory / "file").touch()
        assert (directory / "file").stat().st_mode & 0o777 == 0o600
    assert os.environ.get("GRADIO_TEMP_DIR") != uploads and os.listdir(tmp_path) == []
