"""Options of the commands that sign images with content credentials."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openpulid.cli.options import find_set_options
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


def load_signer(ctx: typer.Context) -> ContentSigner | None:
    """Load the signer of a command's options; None without `--c2pa`.

    Raises:
        OptionError: a file is missing, or cannot be used.
    """
    certificate, key = ctx.params["c2pa_cert"], ctx.params["c2pa_key"]
    if not ctx.params["c2pa"]:
        if find_set_options(ctx).keys() & {"c2pa_cert", "c2pa_key"}:
            raise OptionError("--c2pa-cert and --c2pa-key only have an effect with --c2pa; add it.")
        return None
    from openpulid.io.content_credentials import ContentSigner, require_library

    require_library()
    certificate = certificate or os.environ.get(CERTIFICATE_VARIABLE)
    key = key or os.environ.get(KEY_VARIABLE)
    if certificate is None or key is None:
        raise OptionError(
            "--c2pa needs a certificate and its key: pass --c2pa-cert FILE and --c2pa-key FILE, or "
            f"set {CERTIFICATE_VARIABLE} and {KEY_VARIABLE}; an authority of the C2PA trust list "
            "issues them, and docs/provenance.md shows how to create some for a test."
        )
    return ContentSigner.load(certificate, key)
