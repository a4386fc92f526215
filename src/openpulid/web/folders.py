"""The folder of the page's files: private, and removed at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openpulid.io.files import make_folder
from openpulid.io.temporary import private_directory
from openpulid.pipelines.request import ModelSelection
from openpulid.web.history import UPLOADS
from openpulid.web.session import WebSession

UPLOAD_VARIABLE = "GRADIO_TEMP_DIR"


@contextmanager
def open_session(
    device: str | None, models: ModelSelection, **options: Any
) -> Iterator[WebSession]:
    """Open a session whose images and uploads are private, and are removed at the end.

    Args:
        device: where to compute.
        models: the preset that is selected first, with its changes.
        options: further arguments of `WebSession`.
    """
    with (
        private_directory() as directory,
        _private_files(),
        _upload_to(directory / UPLOADS),
    ):
        yield WebSession(directory, device, models, **options)


@contextmanager
def _private_files() -> Iterator[None]:
    """Let only the owner read the files that this process writes, Gradio's among them."""
    previous = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(previous)


@contextmanager
def _upload_to(directory: Path) -> Iterator[None]:
    """Let Gradio store uploads, and its copies of images, in a folder."""
    make_folder(directory)
    previous = os.environ.get(UPLOAD_VARIABLE)
    os.environ[UPLOAD_VARIABLE] = str(directory)
    try:
        yield
    finally:
        del os.environ[UPLOAD_VARIABLE]
        if previous is not None:
            os.environ[UPLOAD_VARIABLE] = previous
