"""Content Credentials: signed C2PA manifests that state the origin of an image.

https://spec.c2pa.org. A manifest of this package has one action, `c2pa.created`, with the source
type and the software. It names no input of the generation, and no hash of one. Nothing here opens a
network connection.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from openpulid import __version__
from openpulid.errors import OptionError, first_line
from openpulid.io.metadata import encode_image
from openpulid.io.xmp import DigitalSourceType

MIME_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
}

SETTINGS = {
    # the library would ask the servers that a stranger's file names
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
    "builder": {"thumbnail": {"enabled": False}},
}

UNTRUSTED = "signingCredential.untrusted"
TAMPERED = (".mismatch", ".missing")
"""Ends of the status codes of a file that was changed after it was signed."""


@dataclass(frozen=True)
class Action:
    """What a manifest states about one step, such as `c2pa.created`."""

    name: str
    source_type: str | None = None
    software: str | None = None


@dataclass(frozen=True)
class ContentCredentials:
    """The C2PA manifest of a file, and what its signature is worth.

    Attributes:
        state: "trusted": the signature is valid, and a trusted authority issued the certificate;
            "untrusted": valid, of a certificate that anybody can have created; "tampered": the file
            or the manifest was changed after it was signed; "invalid": broken in another way;
            "remote": the manifest is stored on a server, which is not asked.
        problems: what is broken: codes of the specification, or the library's message.
        claim_generator: the program that created the manifest.
        signed_by: organization and name in the certificate.
        signed_at: the signed time; None without a time stamp.
        actions: what was done.
    """

    state: str
    problems: tuple[str, ...] = ()
    claim_generator: str | None = None
    signed_by: str | None = None
    signed_at: str | None = None
    actions: tuple[Action, ...] = ()

    @property
    def is_broken(self) -> bool:
        """Whether the signature is not valid."""
        return self.state in ("tampered", "invalid")


@dataclass(frozen=True, repr=False)
class ContentSigner:
    """Signs images with a certificate and its private key; created by `load`.

    Attributes:
        certificates: PEM of the certificate, then those of the authorities above it.
        key: PEM of the private key, as PKCS#8.
        algorithm: C2PA's name of the signature algorithm.
    """

    certificates: bytes
    key: bytes
    algorithm: str

    @classmethod
    def load(
        cls, certificate: str | os.PathLike[str], key: str | os.PathLike[str]
    ) -> ContentSigner:
        """Load a signer, and sign a small image to see that it works.

        Args:
            certificate: PEM file with the certificate, then those of the authorities above it.
            key: PEM file with the private key (EC, Ed25519 or RSA), without a password.

        Raises:
            OptionError: c2pa-python is not installed, a file cannot be read, or signatures of the
                certificate are not valid.
        """
        require_library()
        from cryptography.hazmat.primitives import serialization

        certificates = _read(certificate)
        private_key = _load_key(key)
        first = _load_certificates(certificate, certificates)[0]
        if private_key.public_key() != first.public_key():
            raise OptionError(
                f"{os.fspath(key)} is not the key of the first certificate in "
                f"{os.fspath(certificate)}."
            )
        encoded = private_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        signer = cls(certificates, encoded, _find_algorithm(private_key))
        signer._sign_sample()
        return signer

    def _sign_sample(self) -> None:
        """Raise `OptionError` unless signatures are valid: certificates have many requirements."""
        from PIL import Image

        sample = encode_image(Image.new("RGB", (8, 8)))
        signed = self.sign(sample, ".png", DigitalSourceType.GENERATED)
        credentials = read_credentials(io.BytesIO(signed), MIME_TYPES[".png"])
        assert credentials is not None
        if credentials.is_broken:
            raise _cannot_sign(", ".join(credentials.problems))

    def sign(self, image: bytes, suffix: str, source_type: DigitalSourceType) -> bytes:
        """Return an image file with a signed manifest.

        Args:
            image: content of a PNG, JPEG or WebP file.
            suffix: its format, such as ".png".
            source_type: how the image was made.

        Raises:
            OptionError: the certificate cannot be used.
        """
        import c2pa

        signed = io.BytesIO()
        try:
            info = c2pa.C2paSignerInfo(self.algorithm, self.certificates, self.key, None)
            manifest = _create_manifest(source_type)
            with (
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(manifest, context=_create_context()) as builder,
            ):
                builder.sign(signer, MIME_TYPES[suffix.lower()], io.BytesIO(image), signed)
        except c2pa.C2paError as error:
            raise _cannot_sign(str(error)) from None
        return signed.getvalue()


def _create_manifest(source_type: DigitalSourceType) -> dict[str, Any]:
    """Return the definition of a manifest; the library adds the hash of the file."""
    software = {"name": "openpulid", "version": __version__}
    action = {
        "action": "c2pa.created",
        "digitalSourceType": source_type.uri,
        "softwareAgent": software,
    }
    # "created": stated by the signer itself, not gathered from somebody else
    assertion = {"label": "c2pa.actions.v2", "created": True, "data": {"actions": [action]}}
    return {"claim_generator_info": [software], "assertions": [assertion]}


def _create_context(trust_anchors: bytes | None = None) -> Any:
    import c2pa

    settings: dict[str, Any] = dict(SETTINGS)
    if trust_anchors is not None:
        settings["trust"] = {"trust_anchors": trust_anchors.decode("ascii", "replace")}
    return c2pa.Context(settings=c2pa.Settings.from_dict(settings))


def _cannot_sign(reason: str) -> OptionError:
    return OptionError(
        f"the certificate cannot sign content credentials ({reason}); docs/provenance.md describes "
        "the certificates that can."
    )


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise OptionError(f"{os.fspath(path)} cannot be read ({error.strerror}).") from None


def _load_certificates(path: str | os.PathLike[str], content: bytes) -> list[Any]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError:
        raise OptionError(f"{os.fspath(path)} contains no certificate in PEM.") from None


def _load_key(path: str | os.PathLike[str]) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization

    content = _read(path)
    try:
        return serialization.load_pem_private_key(content, None)
    except TypeError:
        raise OptionError(
            f"{os.fspath(path)} has a password; `openssl pkcs8 -topk8 -nocrypt -in KEY -out NEW` "
            "writes the key without it."
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise OptionError(f"{os.fspath(path)} contains no private key in PEM.") from None


def _find_algorithm(key: Any) -> str:
    """Return C2PA's name of the signature algorithm of a private key."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey):
        return {256: "es256", 384: "es384", 521: "es512"}.get(key.key_size, "es256")
    return "ps256" if isinstance(key, rsa.RSAPrivateKey) else "ed25519"


def has_library() -> bool:
    """Return whether c2pa-python is installed."""
    return find_spec("c2pa") is not None


def require_library() -> None:
    """Raise `OptionError` unless c2pa-python is installed."""
    if not has_library():
        raise OptionError(
            "content credentials need c2pa-python: pip install 'openpulid[provenance]'."
        )


def read_trust_anchors(path: str | os.PathLike[str]) -> bytes:
    """Read the certificates of the authorities that a user trusts, from a PEM file.

    Raises:
        OptionError: c2pa-python is not installed, or the file has no certificates.
    """
    require_library()
    content = _read(path)
    _load_certificates(path, content)
    return content


def read_credentials(
    file: BinaryIO, mime_type: str, trust_anchors: bytes | None = None
) -> ContentCredentials | None:
    """Read the manifest of an image file, and check its signature.

    Args:
        file: the open file; c2pa-python is installed.
        mime_type: its format.
        trust_anchors: PEM of the authorities that are trusted; by default none is.

    Returns:
        The manifest; None if the file has none.
    """
    import c2pa

    try:
        with c2pa.Reader(mime_type, file, context=_create_context(trust_anchors)) as reader:
            report = json.loads(reader.json())
    except c2pa.C2paError.ManifestNotFound:
        return None
    except c2pa.C2paError as error:
        state = "remote" if str(error).startswith("Remote") else "invalid"
        return ContentCredentials(state, (first_line(error),))
    return _parse_report(report)


def _parse_report(report: dict[str, Any]) -> ContentCredentials:
    """Translate the library's report on the active manifest."""
    manifest = report["manifests"][report["active_manifest"]]
    codes = [problem["code"] for problem in report.get("validation_status", ())]
    problems = tuple(dict.fromkeys(code for code in codes if code != UNTRUSTED))
    state = {"Trusted": "trusted", "Valid": "untrusted"}.get(report["validation_state"], "invalid")
    if state == "invalid" and any(code.endswith(TAMPERED) for code in problems):
        state = "tampered"
    signature = manifest.get("signature_info") or {}
    signer = dict.fromkeys(filter(None, map(signature.get, ("issuer", "common_name"))))
    actions = [
        action
        for assertion in manifest.get("assertions", ())
        if assertion["label"].startswith("c2pa.actions")
        for action in assertion["data"].get("actions", ())
    ]
    return ContentCredentials(
        state=state,
        problems=problems,
        claim_generator=_describe_software(manifest.get("claim_generator_info", [None])[0])
        or manifest.get("claim_generator"),
        signed_by=", ".join(signer) or None,
        signed_at=signature.get("time"),
        actions=tuple(
            Action(
                str(action.get("action")),
                action.get("digitalSourceType"),
                _describe_software(action.get("softwareAgent")),
            )
            for action in actions
        ),
    )


def _describe_software(agent: Any) -> str | None:
    """Return the name and version of a program: text in the first version of the specification."""
    if isinstance(agent, dict):
        return " ".join(str(agent[key]) for key in ("name", "version") if agent.get(key)) or None
    return agent if isinstance(agent, str) else None
