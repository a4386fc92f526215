"""Decode images in a child process with limits on time and memory, as a server needs it.

The parent writes a line of JSON with the options and then the file, and reads a line of JSON with
the size or the reason of a failure and then the pixels.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict

from PIL import Image

from openpulid.io.containers import UnusableFile
from openpulid.io.decoding import DecodedImage, DecodeOptions, decode_file

MAX_MEMORY_BYTES = 4 * 2**30
"""Address space of the child, several times what the largest image needs."""

# -I: neither the working directory nor the environment adds modules
COMMAND = (
    "import sys; sys.path[:] = sys.argv[1:]; "
    "from openpulid.io.decode_process import serve_one; serve_one()"
)


def decode_in_child(data: bytes, options: DecodeOptions, time_limit: float) -> DecodedImage:
    """Decode the content of an image file in a child process.

    Args:
        data: content of the file.
        options: what to decode it to.
        time_limit: seconds after which the child is ended.

    Raises:
        UnusableFile: the file cannot be used, or decoding takes longer.
    """
    header = json.dumps(asdict(options)).encode() + b"\n"
    path = [os.path.abspath(entry) for entry in sys.path]
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-c", COMMAND, *path],
            input=header + data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=time_limit,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UnusableFile(
            f"takes longer than {time_limit:g} s to decode; save it again as a smaller JPEG"
        ) from None
    line, _, pixels = process.stdout.partition(b"\n")
    if not line:
        raise UnusableFile("is damaged or cut short (its decoder was ended)")
    reply = json.loads(line)
    if "reason" in reply:
        raise UnusableFile(reply["reason"])
    image = Image.frombytes(reply["mode"], tuple(reply["size"]), pixels)
    return DecodedImage(image, tuple(reply["notes"]))


def serve_one() -> None:
    """Decode the image on standard input; the main function of the child."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    options = DecodeOptions(**json.loads(sys.stdin.buffer.readline()))
    try:
        decoded = decode_file(sys.stdin.buffer.read(), options)
    except UnusableFile as error:
        sys.stdout.buffer.write(json.dumps({"reason": str(error)}).encode() + b"\n")
        return
    image = decoded.image
    reply = {"mode": image.mode, "size": image.size, "notes": decoded.notes}
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n" + image.tobytes())
