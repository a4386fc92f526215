"""The progress bar of `pulid generate`: drawn on a terminal, and nowhere else."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image

from openpulid.cli.run import ProgressBar
from openpulid.pipelines.presets import MINIATURE
from tests.cli.conftest import Run

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""Codes that move the cursor, erase lines and set colors."""

FRAME = re.compile(r"image (\d) of (\d)\s+\S+\s+(\d+)/(\d+) steps (-:--:--|\d:\d\d:\d\d)")
NUM_STEPS = 5


class Terminal(StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True

    def frames(self) -> list[tuple[str, ...]]:
        """Return image, images, steps, all steps and time left of each state of the bar."""
        return FRAME.findall(CONTROL.sub("", self.getvalue()))


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Replace stderr by a terminal. Called in a test: pytest sets stderr after the fixtures."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    return stream


def generate(pulid: Run, out: Path) -> str:
    """Generate two images, and return what is printed on the captured stderr."""
    if not (MINIATURE / "pipeline").exists():
        pytest.skip("the miniature is not built")
    done = pulid(
        "generate", "portrait", "--steps", NUM_STEPS, "--num", 2, "--device", "cpu", "-o", out
    )
    assert done.code == 0, done.err
    paths = done.out.splitlines()
    assert [Path(path).name for path in paths] == ["portrait-0.png", "portrait-1.png"]
    assert all(Image.open(path).size == (96, 96) for path in paths)
    return done.err


def test_terminal_shows_steps_images_and_the_time_left(
    pulid: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = open_terminal(monkeypatch)
    generate(pulid, tmp_path)
    frames = terminal.frames()
    shown = {frame[:4] for frame in frames}
    total = str(NUM_STEPS)
    assert shown >= {
        (image, "2", str(step), total) for image in "12" for step in range(1, NUM_STEPS + 1)
    }
    assert {frame[3] for frame in frames} == {total}
    for image in "12":
        times = [time for number, _, step, _, time in frames if number == image and step in "34"]
        assert times and all(re.fullmatch(r"\d:\d\d:\d\d", time) for time in times)
    # the bar is erased in the end
    assert terminal.getvalue().rstrip().endswith("\x1b[2K")


def test_pipe_shows_no_bar(pulid: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    text = generate(pulid, tmp_path)
    assert "\x1b" not in text and "steps" not in text and "image 1" not in text


def test_bar_has_the_steps_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests, of two images and of one; a face of the first image is refined in 3 steps."""
    terminal = open_terminal(monkeypatch)
    bar = ProgressBar(3)

    def show(first: int, last: int, total: int) -> None:
        for step in range(first, last + 1):
            bar.show_step(step, total, lambda: Image.new("RGB", (1, 1)))

    bar.start_request(2)
    show(1, 4, 8)
    show(5, 7, 11)
    bar.finish_image()
    show(8, 11, 11)
    bar.finish_image()
    bar.start_request(1)
    show(1, 2, 2)
    bar.finish_image()
    bar.stop()
    counts = list(dict.fromkeys(frame[:4] for frame in terminal.frames()))
    expected = [("1", "3", str(step), "4") for step in range(5)]
    expected += [("1", "3", str(step), "7") for step in range(5, 8)]
    expected += [("2", "3", str(step), "4") for step in range(5)]
    expected += [("3", "3", str(step), "2") for step in range(3)]
    assert counts == expected
