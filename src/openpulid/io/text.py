"""Text files of users, in any usual encoding."""

from __future__ import annotations

import codecs


def decode_text(data: bytes) -> str:
    """Decode text that another program wrote.

    UTF-8 with or without a byte order mark, and UTF-16, are recognized. What is neither is read as
    Windows-1252. A character of UTF-8 that is cut at the end is left out.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    if b"\0" in data:  # UTF-16 without its mark: every other byte of Latin text is zero
        is_little_endian = data[1::2].count(0) > data[::2].count(0)
        encoding = "utf-16-le" if is_little_endian else "utf-16-be"
        return data.decode(encoding, errors="replace")
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(data)
    except UnicodeDecodeError:
        return data.decode("cp1252", errors="replace")
