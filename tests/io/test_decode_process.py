"""Decoding in a child process: the same images and errors, and a limit on time."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
from PIL import Image

from openpulid.errors import ImageError
from openpulid.io.images import open_image, open_mask
from tests.support.image_files import IMAGES, encode


def test_child_decodes_the_same(caplog: pytest.LogCaptureFixture) -> None:
    path = IMAGES / "profile-prophoto.png"
    assert open_image(path, time_limit=60).tobytes() == open_image(path).tobytes()
    mask = IMAGES / "mask-white-on-transparent.png"
    decoded = open_mask(mask, time_limit=60)
    assert decoded.mode == "L" and decoded.tobytes() == open_mask(mask).tobytes()
    transparent = encode(Image.new("RGBA", (16, 16)))
    assert open_image(transparent, name="a.png", time_limit=60).getpixel((0, 0)) == (255,) * 3
    assert caplog.messages == ["a.png: is transparent everywhere; it is read as white"]


def test_errors_of_the_child_name_the_file() -> None:
    with pytest.raises(ImageError, match=r"^a\.png: is not an image"):
        open_image(b"text", name="a.png", time_limit=60)
    large = encode(Image.new("L", (100, 100)))
    with pytest.raises(ImageError, match="100 x 100 pixels, more than the limit"):
        open_image(large, max_pixels=5000, time_limit=60)


def test_child_is_ended_after_the_time_limit() -> None:
    data = encode(Image.new("RGB", (4000, 4000)), "JPEG")
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"b\.jpg: takes longer than 0\.01 s to decode"):
        open_image(data, name="b.jpg", time_limit=0.01)
    assert time.monotonic() - start < 5


def test_waiting_for_a_core_does_not_count() -> None:
    """On a busy machine a child may wait for longer than decoding takes."""
    file = IMAGES / "profile-prophoto.png"
    with ThreadPoolExecutor(1) as pool:
        opened = pool.submit(open_image, file, time_limit=2)
        while (child := find_decoder()) is None:
            time.sleep(0.01)
        child.suspend()
        time.sleep(2.5)
        child.resume()
        assert opened.result().tobytes() == open_image(file).tobytes()


def find_decoder() -> psutil.Process | None:
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "serve_one" in "".join(child.cmdline()):
                return child
    return None


@pytest.mark.skipif(not hasattr(signal, "SIGXCPU"), reason="no limit on processor time")
def test_processor_time_is_limited() -> None:
    with pytest.raises(ImageError, match=r"slow-to-decode\.jp2: takes longer than 1 s to decode"):
        open_image(IMAGES / "slow-to-decode.jp2", time_limit=1)


def test_pil_images_need_no_child() -> None:
    assert open_image(Image.new("RGB", (16, 16), "red"), time_limit=0.001).size == (16, 16)
