"""Write files atomically: a file is complete or absent, even if the process is stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image


def save_png(path: Path, image: Image.Image) -> None:
    """Save an image as PNG in one step; create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    image.save(temporary)
    os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON in one step; create its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1) + "\n", "utf-8")
    os.replace(temporary, path)
