"""Signed manifests: what they state, what they never state, and what a signature is worth."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import c2pa
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

from openpulid import __version__
from openpulid.errors import OptionError
from openpulid.io.content_credentials import (
    MIME_TYPES,
    Action,
    ContentCredentials,
    ContentSigner,
    read_credentials,
    read_trust_anchors,
)
from openpulid.io.metadata import encode_image
from openpulid.io.xmp import DigitalSourceType
from tests.support.certificates import Authority

EDITED = DigitalSourceType.EDITED
SUFFIXES = (".png", ".jpg", ".webp")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def signer(authority: Authority) -> ContentSigner:
    files = authority.issue()
    return ContentSigner.load(files.certificate, files.key)


def picture(suffix: str) -> bytes:
    return encode_image(Image.radial_gradient("L").convert("RGB"), suffix, {"prompt": "portrait"})


def read(
    content: bytes, suffix: str, trust_anchors: bytes | None = None
) -> ContentCredentials | None:
    return read_credentials(BytesIO(content), MIME_TYPES[suffix], trust_anchors)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_signed_image_states_its_origin(
    signer: ContentSigner, authority: Authority, suffix: str
) -> None:
    image = picture(suffix)
    signed = signer.sign(image, suffix, EDITED)
    expected = ContentCredentials(
        state="untrusted",
        claim_generator=f"openpulid {__version__}",
        signed_by="Test organization, signer",
        actions=(Action("c2pa.created", EDITED.uri, f"openpulid {__version__}"),),
    )
    assert read(signed, suffix) == expected
    trusted = read(signed, suffix, read_trust_anchors(authority.certificate))
    assert trusted is not None and trusted.state == "trusted"
    # pixels, mark and request are as they were
    before, after = Image.open(BytesIO(image)), Image.open(BytesIO(signed))
    assert before.tobytes() == after.tobytes()
    assert before.info["xmp"] == after.info["xmp"]
    assert before.info.get("openpulid") == after.info.get("openpulid")
    assert read(image, suffix) is None


def test_manifest_has_nothing_but_the_action(signer: ContentSigner) -> None:
    signed = signer.sign(picture(".png"), ".png", DigitalSourceType.GENERATED)
    with c2pa.Reader("image/png", BytesIO(signed)) as reader:
        report = json.loads(reader.detailed_json())
    (manifest,) = report["manifests"].values()
    assert set(manifest["assertion_store"]) == {"c2pa.actions.v2", "c2pa.hash.data"}
    assert manifest["assertion_store"]["c2pa.actions.v2"] == {
        "actions": [
            {
                "action": "c2pa.created",
                "digitalSourceType": DigitalSourceType.GENERATED.uri,
                "softwareAgent": {"name": "openpulid", "version": __version__},
            }
        ]
    }
    # stated by the signer, not gathered from somebody else
    created = [entry["url"] for entry in manifest["claim"]["created_assertions"]]
    assert any(url.endswith("c2pa.actions.v2") for url in created)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_changed_file_is_tampered(signer: ContentSigner, suffix: str) -> None:
    signed = signer.sign(picture(suffix), suffix, EDITED)
    changes = {
        "pixels": (len(signed) - 40, 1),
        "source type": (signed.index(b"digitalSourceType") + 70, 0x20),
        "XMP": (signed.rindex(b"trainedAlgorithmicMedia"), 0x20),
    }
    for name, (position, bits) in changes.items():
        changed = bytearray(signed)
        changed[position] ^= bits
        credentials = read(bytes(changed), suffix)
        assert credentials is not None and credentials.state == "tampered", name
        assert credentials.is_broken and credentials.problems


def test_damaged_manifest_is_invalid(signer: ContentSigner) -> None:
    signed = bytearray(signer.sign(picture(".png"), ".png", EDITED))
    signed[signed.index(b"c2pa.claim.v2") - 30 :][:20] = bytes(20)
    start = signed.index(b"jumdc2ma")
    signed[start + 8 : start + 40] = bytes(32)
    credentials = read(bytes(signed), ".png")
    assert credentials is not None and credentials.is_broken


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP521R1()),
        rsa.generate_private_key(65537, 2048),
        ed25519.Ed25519PrivateKey.generate(),
    ],
    ids=["es384", "es512", "ps256", "ed25519"],
)
def test_every_kind_of_key_signs(authority: Authority, key: object) -> None:
    files = authority.issue("other kind", key)
    signed = ContentSigner.load(files.certificate, files.key).sign(picture(".png"), ".png", EDITED)
    credentials = read(signed, ".png", authority.pem)
    assert credentials is not None and credentials.state == "trusted"


def test_key_of_openssl_signs(authority: Authority) -> None:
    files = authority.issue("old format", key_format=PrivateFormat.TraditionalOpenSSL)
    assert b"BEGIN EC PRIVATE KEY" in files.key.read_bytes()
    assert ContentSigner.load(files.certificate, files.key).algorithm == "es256"


def test_unusable_certificates_are_one_sentence(authority: Authority, tmp_path: Path) -> None:
    good, other = authority.issue("good"), authority.issue("other")
    locked = authority.issue("locked", password=b"secret")
    expired = authority.issue("expired", days=-1)
    website = authority.issue("website", usage=ExtendedKeyUsageOID.SERVER_AUTH)
    text = tmp_path / "text.pem"
    text.write_text("hello")
    cases = [
        (tmp_path / "none.pem", good.key, "cannot be read"),
        (good.certificate, tmp_path / "none.key", "cannot be read"),
        (text, good.key, "no certificate in PEM"),
        (good.certificate, text, "no private key in PEM"),
        (good.certificate, good.certificate, "no private key in PEM"),
        (good.certificate, other.key, "is not the key of the first certificate"),
        (locked.certificate, locked.key, "has a password"),
        (expired.certificate, expired.key, "cannot sign content credentials"),
        (website.certificate, website.key, "cannot sign content credentials"),
    ]
    for certificate, key, reason in cases:
        with pytest.raises(OptionError, match=reason) as error:
            ContentSigner.load(certificate, key)
        assert "\n" not in str(error.value) and "BEGIN" not in str(error.value)
    with pytest.raises(OptionError, match="no certificate in PEM"):
        read_trust_anchors(text)


def test_signer_does_not_show_its_key(signer: ContentSigner) -> None:
    assert "PRIVATE" not in repr(signer) and "BEGIN" not in repr(signer)


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Run a server that records its requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/manifest.c2pa", requests
        http.shutdown()


def test_no_server_is_asked(server: tuple[str, list[str]]) -> None:
    url, requests = server
    packet = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" '
        f'dcterms:provenance="{url}"/></rdf:RDF></x:xmpmeta>'
    )
    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", xmp=packet.encode())
    credentials = read(file.getvalue(), ".jpg")
    assert credentials is not None and credentials.state == "remote"
    assert not credentials.is_broken and requests == []
    with pytest.raises(c2pa.C2paError):  # the library's default asks it
        c2pa.Reader("image/jpeg", BytesIO(file.getvalue()))
    assert requests == ["/manifest.c2pa"]
