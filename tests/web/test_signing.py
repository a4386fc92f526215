"""Images of a page that is started with `--c2pa`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openpulid.cli.web import web as web_command
from openpulid.errors import OptionError
from openpulid.io.content_credentials import ContentSigner, read_credentials
from openpulid.pipelines.provenance import Provenance
from openpulid.web.session import WebSession

pytest.importorskip("gradio", reason="extra web is not installed", exc_type=ImportError)
pytest.importorskip("c2pa", reason="extra provenance is not installed", exc_type=ImportError)

from openpulid.web import events
from openpulid.web.results import zip_images
from tests.support.certificates import Authority, SignerFiles
from tests.web.page_support import free_port, generate


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SignerFiles:
    return Authority(tmp_path_factory.mktemp("authority")).issue()


def test_every_image_is_signed(tmp_path: Path, anna: Path, files: SignerFiles) -> None:
    signer = ContentSigner.load(files.certificate, files.key)
    session = WebSession(tmp_path, signer=signer)
    images = generate(session, reference_images=[(str(anna), None)], also_without_identity=True)
    assert len(images) == 2
    for image in images:
        with Path(image.file).open("rb") as file:
            credentials = read_credentials(file, "image/png")
        assert credentials is not None and credentials.state == "untrusted"
        assert credentials.actions[0].name == "c2pa.created"
        assert Provenance.read(image.file).request.seed == 3
    # an archive has the same files
    assert Path(images[0].file).read_bytes() in Path(zip_images(images)).read_bytes()
    (plain,) = generate(WebSession(tmp_path))
    with Path(plain.file).open("rb") as file:
        assert read_credentials(file, "image/png") is None


def test_options_of_the_command(monkeypatch: pytest.MonkeyPatch, files: SignerFiles) -> None:
    sessions: list[WebSession] = []

    def build(session: WebSession) -> Any:
        sessions.append(session)
        return original(session)

    original = events.build_page
    monkeypatch.setattr(events, "build_page", build)
    monkeypatch.setattr("gradio.Blocks.launch", lambda blocks, **_: None)
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda blocks: None)
    web_command(port=free_port(), c2pa=True, c2pa_cert=files.certificate, c2pa_key=files.key)
    web_command(port=free_port(), host="0.0.0.0")
    first, second = sessions
    assert first.signer is not None and first.allow_paths
    assert second.signer is None and not second.allow_paths
    with pytest.raises(OptionError, match="only have an effect with --c2pa"):
        web_command(port=free_port(), c2pa_key=files.key)
