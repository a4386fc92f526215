"""Images of a service that is started with `--c2pa`."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

pytest.importorskip("c2pa", reason="extra provenance is not installed", exc_type=ImportError)

from openpulid.cli.main import app
from openpulid.errors import OptionError
from openpulid.io.content_credentials import ContentCredentials, read_credentials
from openpulid.pipelines.provenance import Provenance
from openpulid.service.api.app import create_app
from openpulid.service.api.backend import Backend
from tests.service.api.conftest import PHOTO, serve
from tests.support.certificates import Authority, SignerFiles

REQUEST = {"prompt": "portrait", "size": "96x96", "num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SignerFiles:
    return Authority(tmp_path_factory.mktemp("authority")).issue()


@pytest.fixture(scope="module")
def signing_client(backend: Backend, files: SignerFiles) -> Iterator[httpx.Client]:
    config = replace(backend.config, signer_files=(files.certificate, files.key))
    with (
        serve(create_app(replace(backend, config=config))) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def credentials_of(content: bytes, kind: str) -> ContentCredentials:
    credentials = read_credentials(io.BytesIO(content), f"image/{kind}")
    assert credentials is not None and credentials.state == "untrusted"
    assert [action.name for action in credentials.actions] == ["c2pa.created"]
    return credentials


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_format_is_signed(
    signing_client: httpx.Client, client: httpx.Client, tmp_path: Path, kind: str
) -> None:
    body = {**REQUEST, "output_format": kind}
    answer = signing_client.post("/v1/images/generations", json=body).json()
    content = base64.b64decode(answer["data"][0]["b64_json"])
    credentials_of(content, kind)
    if kind == "png":
        (tmp_path / "image.png").write_bytes(content)
        assert Provenance.read(tmp_path / "image.png").request.seed == 3
    address = f"/v1/jobs/{answer['job']}/images/0"
    credentials_of(signing_client.get(address, params={"format": kind}).content, kind)
    # the stored image is not signed, so a service without a certificate can still read it
    plain = client.get(address, params={"format": kind}).content
    assert read_credentials(io.BytesIO(plain), f"image/{kind}") is None


def test_streamed_images_are_signed(signing_client: httpx.Client) -> None:
    body = {**REQUEST, "stream": True}
    lines = signing_client.post("/v1/images/generations", json=body).text.splitlines()
    (data,) = [line for line in lines if line.startswith("data:") and "completed" in line]
    content = base64.b64decode(data.split('"b64_json":"')[1].split('"')[0])
    credentials_of(content, "png")


def test_images_of_fal_are_signed(signing_client: httpx.Client) -> None:
    size = {"width": 96, "height": 96}
    fal = {"prompt": "portrait", "reference_image_url": PHOTO, "image_size": size}
    body = {**fal, "num_inference_steps": 2, "sync_mode": True}
    answer = signing_client.post("/fal-ai/flux-pulid", json=body).json()
    header, data = answer["images"][0]["url"].split(",")
    credentials_of(base64.b64decode(data), header.split("/")[1].split(";")[0])


def test_bad_certificate_is_reported_before_a_model_is_loaded(
    tmp_path: Path, files: SignerFiles
) -> None:
    data = tmp_path / "data"
    options = ["serve", "--data", str(data), "--c2pa", "--c2pa-key", str(files.key)]
    result = CliRunner().invoke(app, [*options, "--c2pa-cert", str(files.key)])
    assert isinstance(result.exception, OptionError)
    assert "contains no certificate" in str(result.exception)
    assert not data.exists()
