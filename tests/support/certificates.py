"""Certificates for tests: an authority, and signers that it vouches for."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class SignerFiles:
    """PEM files: a certificate with that of its authority, and the private key."""

    certificate: Path
    key: Path


class Authority:
    """A certificate authority, whose own certificate is the file `certificate`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name("Test authority")
        self.pem = _pem(self._build(self.name, self.key, is_authority=True, days=30))
        self.certificate = folder / "authority.pem"
        self.certificate.write_bytes(self.pem)

    def issue(
        self,
        name: str = "signer",
        key: Any = None,
        *,
        days: int = 30,
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION,
        password: bytes | None = None,
        key_format: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
    ) -> SignerFiles:
        """Issue a certificate for a new key, valid since three days and for `days` more."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        certificate = self._build(_name(name), key, is_authority=False, days=days, usage=usage)
        files = SignerFiles(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        files.certificate.write_bytes(_pem(certificate) + self.pem)
        encryption: Any = serialization.NoEncryption()
        if password is not None:
            encryption = serialization.BestAvailableEncryption(password)
        pem = serialization.Encoding.PEM
        files.key.write_bytes(key.private_bytes(pem, key_format, encryption))
        return files

    def _build(
        self,
        subject: x509.Name,
        key: Any,
        *,
        is_authority: bool,
        days: int,
        usage: x509.ObjectIdentifier | None = None,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.timezone.utc)
        own_key, issuer_key = key.public_key(), self.key.public_key()
        builder = (
            x509.CertificateBuilder(self.name, subject, own_key, x509.random_serial_number())
            .not_valid_before(now - 3 * DAY)
            .not_valid_after(now + days * DAY)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), True)
            .add_extension(_key_usage(is_authority), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(own_key), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), False)
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
        return builder.sign(self.key, hashes.SHA256())


def _name(text: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Test organization"),
            x509.NameAttribute(NameOID.COMMON_NAME, text),
        ]
    )


def _key_usage(is_authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
