"""Write what a training gives at once, in few files of limited size: a machine may be taken away at any moment."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

PIECE = 15 * 2**20
"""Bytes of the largest file."""


def process_age() -> float:
    """Return the seconds since this process started; 0 where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0


class Output:
    """A folder with `report.json`, `sheets.jpg`, and archives in pieces: `cat base.tar.gz.* | tar xz`.

    Args:
        folder: made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.begin = folder, time.monotonic() - process_age()
        folder.mkdir(parents=True, exist_ok=True)
        self.report: dict[str, Any] = {"log": [], "curves": {}}
        self.sheets: list[tuple[str, Image.Image]] = []

    @property
    def seconds(self) -> float:
        """Seconds since the process started, imports included."""
        return time.monotonic() - self.begin

    def say(self, text: str) -> None:
        """Print a line with the time, and keep it for the report."""
        line = f"[{self.seconds:6.1f}] {text}"
        print(line, flush=True)
        self.report["log"].append(line)

    def point(self, curve: str, **values: float) -> None:
        """Add a point to a curve of the report."""
        rounded = {name: round(value, 5) for name, value in values.items()}
        self.report["curves"].setdefault(curve, []).append(
            {"seconds": round(self.seconds, 1), **rounded}
        )

    def figures(self, stage: str, figures: Mapping[str, Any]) -> None:
        """Keep the figures of a stage, and write the report."""
        self.report.setdefault("figures", {})[stage] = dict(figures)
        self.say(f"{stage}: {json.dumps(dict(figures), default=str)}")
        self.write()

    def sheet(self, title: str, image: Image.Image) -> None:
        """Keep a contact sheet, and write all of them."""
        self.sheets.append((title, image))
        width = max(image.width for _, image in self.sheets)
        height = sum(image.height + 20 for _, image in self.sheets)
        whole = Image.new("RGB", (width, height), "white")
        top = 0
        for title_, image_ in self.sheets:
            ImageDraw.Draw(whole).text((4, top + 4), title_, fill="black")
            whole.paste(image_, (0, top + 20))
            top += image_.height + 20
        whole.save(self.folder / "sheets.jpg", quality=88)

    def write(self) -> None:
        """Write the report."""
        (self.folder / "report.json").write_text(json.dumps(self.report, indent=1, default=str))

    def pack(self, name: str, paths: Sequence[tuple[Path, str]]) -> None:
        """Write files and folders, each under a name of its own, as one archive in pieces; replace an older one."""
        memory = io.BytesIO()
        with tarfile.open(fileobj=memory, mode="w:gz", compresslevel=4) as archive:
            for path, arcname in paths:
                archive.add(path, arcname)
        whole = memory.getvalue()
        for old in self.folder.glob(f"{name}.tar.gz.*"):
            old.unlink()
        for index, first in enumerate(range(0, len(whole), PIECE)):
            (self.folder / f"{name}.tar.gz.{index:02d}").write_bytes(whole[first : first + PIECE])
