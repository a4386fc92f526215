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
    """Load the signer of a command's options; None without `--c2pa`.

    Args:
        is_signed: value of `--c2pa`.
        certificate: file of `--c2pa-cert`.
        key: file of `--c2pa-key`.

    Raises:
        OptionError: a file is missing, or cannot be used.
    """
    if not is_signed:
        if certificate is not None or key is not None:
            raise OptionError("--c2pa-cert and --c2pa-key only have an effect with --c2pa; add it.")
        return None
    from openpulid.io.content_credentials import ContentSigner, require_library

    require_library()
    certificate_file = certificate or os.environ.get(CERTIFICATE_VARIABLE)
    key_file = key or os.environ.get(KEY_VARIABLE)
    if certificate_file is None or key_file is None:
        raise OptionError(
            "--c2pa needs a certificate and its key: pass --c2pa-cert FILE and --c2pa-key FILE, or "
            f"set {CERTIFICATE_VARIABLE} and {KEY_VARIABLE}; an authority of the C2PA trust list "
            "issues them, and docs/provenance.md shows how to create some for a test."
        )
    return ContentSigner.load(certificate_file, key_file)
