"""Write results at once, in few files of limited size, because a run may be stopped at any time."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from openpulid.io.image_grid import image_grid, to_pil
from openpulid.io.metadata import save_image

PIECE_BYTES = 15 * 2**20
"""Maximum size of a file of an archive."""


def process_age() -> float:
    """Return the seconds since this process started, or 0 where the system does not report it."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0


class Output:
    """A folder with `report.json`, `sheets.jpg`, and archives in pieces.

    Unpack an archive with `cat base.tar.gz.* | tar xz`.

    Args:
        folder: created if it does not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start = time.monotonic() - process_age()
        folder.mkdir(parents=True, exist_ok=True)
        self.report: dict[str, Any] = {"log": [], "curves": {}, "metrics": {}}
        self.sheets: list[tuple[str, Image.Image]] = []

    @property
    def seconds(self) -> float:
        """Seconds since the process started, imports included."""
        return time.monotonic() - self.start

    def log(self, text: str) -> None:
        """Print a line with the time, and add it to the report."""
        line = f"[{self.seconds:6.1f}] {text}"
        print(line, flush=True)
        self.report["log"].append(line)

    def add_point(self, curve: str, **values: float) -> None:
        """Add a point to a curve of the report."""
        rounded = {name: round(value, 5) for name, value in values.items()}
        point = {"seconds": round(self.seconds, 1), **rounded}
        self.report["curves"].setdefault(curve, []).append(point)

    def add_metrics(self, stage: str, metrics: Mapping[str, Any]) -> None:
        """Add the metrics of a stage, and write the report."""
        self.report["metrics"][stage] = dict(metrics)
        self.log(f"{stage}: {json.dumps(dict(metrics), default=str)}")
        self.write()

    def add_sheet(self, title: str, image: Image.Image) -> None:
        """Add a contact sheet, and write all of them."""
        self.sheets.append((title, image))
        width = max(sheet.width for _, sheet in self.sheets)
        height = sum(sheet.height + 20 for _, sheet in self.sheets)
        canvas = Image.new("RGB", (width, height), "white")
        top = 0
        for label, sheet in self.sheets:
            ImageDraw.Draw(canvas).text((4, top + 4), label, fill="black")
            canvas.paste(sheet, (0, top + 20))
            top += sheet.height + 20
        save_image(canvas, self.folder / "sheets.jpg")

    def write(self) -> None:
        """Write the report."""
        (self.folder / "report.json").write_text(json.dumps(self.report, indent=1, default=str))

    def pack(self, name: str, paths: Sequence[tuple[Path, str]]) -> None:
        """Write an archive in pieces, and delete an older one of the same name.

        Args:
            name: of the archive.
            paths: files and folders, each with its name in the archive.
        """
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=4) as archive:
            for path, arcname in paths:
                archive.add(path, arcname)
        data = buffer.getvalue()
        for piece in self.folder.glob(f"{name}.tar.gz.*"):
            piece.unlink()
        for index, start in enumerate(range(0, len(data), PIECE_BYTES)):
            piece = self.folder / f"{name}.tar.gz.{index:02d}"
            piece.write_bytes(data[start : start + PIECE_BYTES])

    def attempt(self, name: str, stage: Callable[[], object]) -> bool:
        """Run a stage, and report an error instead of raising it.

        Args:
            name: of the stage, for the report.
            stage: the function to call.

        Returns:
            Whether the stage succeeded.
        """
        try:
            stage()
        except Exception:
            self.log(f"{name} failed:\n{traceback.format_exc()[-3000:]}")
            self.write()
            return False
        return True


def draw_sheet(images: Tensor, size: int = 144) -> Image.Image:
    """Lay out images (B, 3, H, W) in [0, 1], eight per row."""
    tiles = to_pil(images.float().cpu())
    return image_grid([tiles[start : start + 8] for start in range(0, len(tiles), 8)], size)
