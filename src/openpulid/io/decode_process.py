"""Decode images in a child process with limits on time and memory, as a server needs it.

The parent writes a line of JSON with the options and then the file, and reads a line of JSON with
the size or the reason of a failure and then the pixels.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict

from PIL import Image

from openpulid.io.containers import UnusableFile
from openpulid.io.decoding import DecodedImage, DecodeOptions, decode_file

MAX_MEMORY_BYTES = 4 * 2**30
"""Address space of the child, several times what the largest image needs."""

WAITING_FACTOR = 6
"""How many times its processor time a child may take on a busy machine."""

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
        time_limit: seconds of processor time after which the child is ended; Windows has no such
            limit, only one on the time that passes.

    Raises:
        UnusableFile: the file cannot be used, or decoding takes longer.
    """
    header = json.dumps({"time_limit": time_limit, "options": asdict(options)}).encode() + b"\n"
    path = [os.path.abspath(entry) for entry in sys.path]
    try:
        process = subprocess.run(
            [sys.executable, "-I", "-c", COMMAND, *path],
            input=header + data,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=WAITING_FACTOR * time_limit,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            check=False,
        )
        is_late = -process.returncode == getattr(signal, "SIGXCPU", None)
    except subprocess.TimeoutExpired:
        is_late = True
    if is_late:
        raise UnusableFile(
            f"takes longer than {time_limit:g} s to decode; save it again as a smaller JPEG"
        )
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
    header = json.loads(sys.stdin.buffer.readline())
    seconds = math.ceil(header["time_limit"])
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
        # the first limit sends SIGXCPU, the second one ends a process that ignores it
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    options = DecodeOptions(**header["options"])
    try:
        decoded = decode_file(sys.stdin.buffer.read(), options)
    except UnusableFile as error:
        sys.stdout.buffer.write(json.dumps({"reason": str(error)}).encode() + b"\n")
        return
    image = decoded.image
    reply = {"mode": image.mode, "size": image.size, "notes": decoded.notes}
    sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n" + image.tobytes())
