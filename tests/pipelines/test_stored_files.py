"""What an image stores of the files of its request, and what a stranger's image can name."""

from __future__ import annotations

import json
import os
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openpulid.errors import PulidError
from openpulid.pipelines.inputs import open_inputs
from openpulid.pipelines.presets import PRESETS
from openpulid.pipelines.provenance import WEIGHT_FIELDS, Provenance, fingerprint_inputs
from openpulid.pipelines.request import GenerationRequest, ModelSelection
from openpulid.pipelines.request_fields import FilePath
from openpulid.pipelines.request_inputs import Control, InitImage, Person
from openpulid.pipelines.request_part import RequestPart
from openpulid.pipelines.selection import resolve_preset
from openpulid.pipelines.weights import resolve_path

PATHS = {
    "/home/anna/private/face.png": "face.png",
    "private/face.png": "face.png",
    "../../private/face.png": "face.png",
    "private/..": "folder",
    "..": "folder",
    ".": "folder",
    "/": "folder",
    "private/face/": "face",
    r"C:\Users\anna\private\face.png": "face.png",
    r"\\private\share\face.png": "face.png",
    r"..\private\face.png": "face.png",
    "file:///home/anna/private/face.png": "face.png",
    "https://anna:private@example.org/private/face.png": "face.png",
    "~/private/face.png": "face.png",
}

FILES: dict[str, Any] = {
    "people": [
        {"images": ["FILE", "FILE"], "mask": "FILE"},
        {"identity": "FILE", "box": [0, 0, 1, 1]},
    ],
    "init_image": {"image": "FILE", "mask": "FILE"},
    "controls": [{"model": "FILE", "image": "FILE"}],
    "loras": [{"model": "FILE"}],
    "embeddings": [{"file": "FILE"}],
    "style_image": {"image": "FILE", "model": "FILE"},
    "model": {"preset": "FILE", "base": "FILE", "adapter": "FILE", "face_pack": "FILE"},
}
"""A request in which every field that can name a file does."""


def with_path(value: Any, path: str) -> Any:
    """Replace "FILE" in a request."""
    if isinstance(value, dict):
        return {key: with_path(entry, path) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_path(entry, path) for entry in value]
    return path if value == "FILE" else value


def request_of(path: str) -> GenerationRequest:
    return GenerationRequest.model_validate({"prompt": "portrait", **with_path(FILES, path)})


def request_parts(part: type[RequestPart] = GenerationRequest) -> Iterator[type[RequestPart]]:
    """Yield the classes that a request is built of."""
    yield part
    for hint in typing.get_type_hints(part).values():
        for kind in (hint, *typing.get_args(hint)):
            if isinstance(kind, type) and issubclass(kind, RequestPart):
                yield from request_parts(kind)


def test_every_field_of_a_path_is_an_input_file() -> None:
    """A field that is not listed would be opened because an image names it."""
    marker = typing.get_args(FilePath)[1]
    number = 0
    for part in request_parts():
        for name, hint in typing.get_type_hints(part, include_extras=True).items():
            if repr(marker) in repr(hint):
                assert name in part.files, f"{part.__name__}.{name}"
                number += 1
    assert number >= 11
    named = {field for field, _ in request_of("x").input_files()}
    missing = {
        f"{part.__name__}.{name}"
        for part in request_parts()
        for name in part.files
        if not any(name in field.split(".") for field in named)
    }
    assert not missing, f"add them to FILES: {missing}"


@pytest.mark.parametrize("path", PATHS)
def test_names_have_no_folders(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("private").mkdir()
    Path("private/face.png").touch()  # a file that exists is no OWNER/NAME of the hub
    provenance = Provenance.create(request_of(path), {})
    for field, name in provenance.request.input_files():
        assert name == PATHS[path], field
    text = json.dumps(provenance.to_metadata())
    assert "private" not in text and "anna" not in text
    # nor does reading an image that names them
    stored = {"request": request_of(path).model_dump(mode="json")}
    assert Provenance.from_json(json.dumps(stored)).request == provenance.request


@pytest.mark.parametrize("path", PATHS)
def test_every_file_is_passed_again(path: str) -> None:
    stored = {"request": request_of(path).model_dump(mode="json")}
    provenance = Provenance.from_json(json.dumps(stored))
    fields = [field for field, _ in provenance.request.input_files()]
    assert list(provenance.required_files()) == fields
    for missing in fields:
        files = dict.fromkeys((field for field in fields if field != missing), "mine.png")
        with pytest.raises(PulidError, match="was generated with"):
            provenance.restore(files)


NAMES = ("mini", "sdxl", "sdxl-base", "control-pose", "owner/name", "flux-dev", "x.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_folder_of_a_known_name_is_never_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory of the user may have a file or folder of any name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PULID_WEIGHTS", raising=False)
    folder = tmp_path / name
    (folder / "pipeline").mkdir(parents=True)
    for file in ("config.json", "model_index.json", "pipeline/model_index.json"):
        (folder / file).write_text("{}")
    stored = {"request": request_of(name).model_dump(mode="json")}
    provenance = Provenance.from_json(json.dumps(stored))
    required = provenance.required_files()
    for field, value in provenance.request.input_files():
        if field in required:
            continue
        # what need not be passed again is a preset or a published weight, and not the folder
        if field == "model.preset":
            assert value in PRESETS and resolve_preset(value).name == value
            continue
        if field == "model.base":
            assert resolve_preset("flux", base=value).models.pipeline == value
        assert field.rpartition(".")[2] in WEIGHT_FIELDS
        try:
            found = resolve_path(value)
        except PulidError:
            continue
        assert not found.resolve().is_relative_to(folder)


def test_hub_names_of_weights_are_kept_and_passed_again() -> None:
    request = GenerationRequest(
        "portrait",
        controls=[Control("owner/pose", "face.png")],
        model=ModelSelection(preset="sdxl", base="owner/name"),
    )
    provenance = Provenance.create(request, {})
    required = provenance.required_files()
    assert required["model.base"] == "owner/name"
    assert required["controls.0.model"] == "owner/pose"
    # a path that looks like one is a path
    for path in ("private/model.safetensors", "../model", "./model", "~/model"):
        changed = request.with_files({"model.base": path})
        assert "/" not in Provenance.create(changed, {}).required_files()["model.base"]


def test_image_opens_nothing_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a file of exactly this name in the working directory."""
    monkeypatch.chdir(tmp_path)
    opened = []
    for name in ("face.png", "mini", "sdxl-base"):
        Path(name).write_bytes(b"secret")
    request = GenerationRequest(
        "portrait",
        people=[Person(images=["face.png"], mask="face.png")],
        init_image=InitImage("face.png", mask="face.png"),
        model=ModelSelection(preset="mini", base="sdxl-base"),
    )
    stored = json.dumps({"request": request.model_dump(mode="json")})

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if is_watching and event == "open" and isinstance(arguments[0], (str, bytes)):
            opened.append(os.path.basename(os.fsdecode(arguments[0])))

    is_watching = True
    sys.addaudithook(audit)  # until the end of the process
    provenance = Provenance.from_json(stored)
    with pytest.raises(PulidError, match=r"was generated with face\.png"):
        provenance.restore()
    assert not {"face.png", "mini", "sdxl-base"} & set(opened)
    # the hook works
    with pytest.raises(PulidError):
        open_inputs(request, PRESETS["sdxl"]().models)
    is_watching = False
    assert "face.png" in opened


def test_hash_of_another_file_is_refused(tmp_path: Path) -> None:
    files = {}
    for name in ("face", "mask", "room"):
        files[name] = tmp_path / f"{name}.png"
        files[name].write_bytes(name.encode())
    request = GenerationRequest(
        "portrait",
        people=[Person(images=[files["face"]], mask=files["mask"])],
        init_image=InitImage(files["room"]),
        model=ModelSelection(preset="mini"),
    )
    provenance = Provenance.create(request, fingerprint_inputs(request))
    given = {
        "people.0.images.0": files["face"],
        "people.0.mask": files["mask"],
        "init_image.image": files["room"],
    }
    assert provenance.restore(given) == request
    other = tmp_path / "other.png"
    other.write_bytes(b"other")
    for field in given:
        with pytest.raises(PulidError, match="is not the file that"):
            provenance.restore({**given, field: other})


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"request": {"prompt": "x", "people": [{"images": ["a"] * 10**5}]}}),
        json.dumps(
            {"request": {"prompt": "x"}, "input_hashes": {str(k): "a" for k in range(10**5)}}
        ),
        json.dumps({"request": {"prompt": "x"}, "input_hashes": {"a": "b" * 10**6}}),
        json.dumps({"request": {"prompt": "x", "model": {"base": "a" * 10**6}}}),
        json.dumps(
            {"request": {"prompt": "x", "controls": [{"model": "a", "image": "b"}] * 10**4}}
        ),
        '{"request": ' * 10**5,
    ],
)
def test_huge_requests_are_one_short_sentence(text: str) -> None:
    with pytest.raises(PulidError) as error:
        Provenance.from_json(text)
    assert len(str(error.value)) < 1000 and "\n" not in str(error.value)
