"""Options of the commands that sign images with content credentials."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openpulid.errors import OptionError

if TYPE_CHECKING:
    from openpulid.io.content_credentials import ContentSigner

CERTIFICATE_VARIABLE = "PULID_C2PA_CERT"
KEY_VARIABLE = "PULID_C2PA_KEY"

Sign = Annotated[
    bool, typer.Option("--c2pa", help="Sign the images with content credentials (C2PA).")
]
Certificate = Annotated[
    Path | None,
    typer.Option(
        help="PEM file with the certificate for --c2pa, then those of the authorities above it; "
        f"by default that of {CERTIFICATE_VARIABLE}.",
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(
        help=f"PEM file with the private key for --c2pa; by default that of {KEY_VARIABLE}."
    ),
]


def load_signer(
    is_signed: bool, certificate: Path | None, key: Path | None
) -> ContentSigner | None:
    """Load the signer of a command's options, see `find_signer_files`; None without `--c2pa`.

    Raises:
        OptionError: a file is missing, or cannot be used.
    """
    files = find_signer_files(is_signed, certificate, key)
    if files is None:
        return None
    from openpulid.io.content_credentials import ContentSigner

    return ContentSigner.load(*files)


def find_signer_files(
    is_signed: bool, certificate: Path | None, key: Path | None
) -> tuple[Path, Path] | None:
    """Return the files of the certificate and of its key; None without `--c2pa`.

    Args:
        is_signed: value of `--c2pa`.
        certificate: file of `--c2pa-cert`.
        key: file of `--c2pa-key`.

    Raises:
        OptionError: c2pa-python is not installed, or a file is missing.
    """
    if not is_signed:
        if certificate is not None or key is not None:
            raise OptionError("--c2pa-cert and --c2pa-key only have an effect with --c2pa; add it.")
        return None
    from openpulid.io.content_credentials import require_library

    require_library()
    certificate_file = certificate or os.environ.get(CERTIFICATE_VARIABLE)
    key_file = key or os.environ.get(KEY_VARIABLE)
    if certificate_file is None or key_file is None:
        raise OptionError(
            "--c2pa needs a certificate and its key: pass --c2pa-cert FILE and --c2pa-key FILE, or "
            f"set {CERTIFICATE_VARIABLE} and {KEY_VARIABLE}; an authority of the C2PA trust list "
            "issues them, and docs/provenance.md shows how to create some for a test."
        )
    return Path(certificate_file), Path(key_file)
