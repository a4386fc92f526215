"""The mark of generated images: written to every format, and read from any program's file."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from openpulid import __version__
from openpulid.io.metadata import encode_image, save_image
from openpulid.io.xmp import MAX_XMP_BYTES, DigitalSourceType, XmpFacts, create_packet, parse_packet

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".PNG")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_carries_the_mark(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image{suffix}"
    save_image(Image.new("RGB", (16, 16), "red"), path, {"prompt": "portrait"})
    info = Image.open(path).info
    packet = info["xmp"]
    assert parse_packet(packet) == XmpFacts(GENERATED, f"openpulid {__version__}")
    assert ("openpulid" in info) == (suffix.lower() == ".png")


@pytest.mark.skipif(shutil.which("exiftool") is None, reason="exiftool is not installed")
@pytest.mark.parametrize("source_type", DigitalSourceType)
def test_exiftool_reads_the_mark(tmp_path: Path, source_type: DigitalSourceType) -> None:
    paths = [tmp_path / f"image{suffix}" for suffix in (".png", ".jpg", ".webp")]
    for path in paths:
        save_image(Image.new("RGB", (16, 16), "red"), path, source_type=source_type)
    names = ("-XMP-iptcExt:DigitalSourceType", "-XMP-xmp:CreatorTool", "-Warning")
    output = subprocess.run(
        ["exiftool", "-json", *names, *paths], capture_output=True, check=True
    ).stdout
    reports = json.loads(output)
    assert len(reports) == 3
    for report in reports:
        assert report["DigitalSourceType"] == source_type.uri
        assert report["CreatorTool"] == f"openpulid {__version__}"
        assert "Warning" not in report


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_photos_get_no_mark(suffix: str) -> None:
    marked = Image.open(BytesIO(encode_image(Image.new("RGB", (16, 16), "red"), suffix)))
    content = encode_image(marked, suffix, source_type=None)
    assert b"DigitalSourceType" not in content and b"openpulid" not in content


def wrap(description: str) -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" '
        'xmlns:e="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        'xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:mm="http://ns.adobe.com/xap/1.0/mm/">'
        f"{description}</rdf:RDF></x:xmpmeta>"
    ).encode()


@pytest.mark.parametrize(
    ("description", "facts"),
    [
        (
            '<rdf:Description e:DigitalSourceType="a" xmp:CreatorTool="b"/>',
            XmpFacts("a", "b"),
        ),
        (
            "<rdf:Description><e:DigitalSourceType>a</e:DigitalSourceType></rdf:Description>"
            "<rdf:Description><xmp:CreatorTool> b\n</xmp:CreatorTool></rdf:Description>",
            XmpFacts("a", "b"),
        ),
        (
            '<rdf:Description><e:DigitalSourceType rdf:resource="a"/></rdf:Description>',
            XmpFacts("a"),
        ),
        # that of an ingredient is not that of the image
        (
            "<rdf:Description><mm:Ingredients><rdf:Bag><rdf:li><rdf:Description "
            'e:DigitalSourceType="a"/></rdf:li></rdf:Bag></mm:Ingredients></rdf:Description>',
            XmpFacts(),
        ),
        ("", XmpFacts()),
    ],
)
def test_packets_of_other_programs_are_read(description: str, facts: XmpFacts) -> None:
    assert parse_packet(wrap(description)) == facts
    assert parse_packet(wrap(description) + b"\0") == facts


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">' + "".join(
    f'<!ENTITY {chr(98 + k)} "{f"&{chr(97 + k)};" * 10}">' for k in range(9)
)


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", "damaged"),
        (b"<a><b></a>", "damaged"),
        (b"<a>" * 300_000, "damaged"),
        (b"\xff\xfe<\0a\0/\0>\0", "utf-8"),
        (b"<a/>" + b" " * MAX_XMP_BYTES, "too large"),
        (f"{BOMB}]><x>&j;</x>".encode(), "document type"),
    ],
)
def test_damaged_packets_are_refused_at_once(packet: bytes, reason: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=reason):
        parse_packet(packet)
    assert time.process_time() - start < 10  # instead of minutes


def test_packet_begins_and_ends_as_specified() -> None:
    packet = create_packet(DigitalSourceType.EDITED)
    assert packet.startswith('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>')
    assert packet.endswith('<?xpacket end="w"?>')
