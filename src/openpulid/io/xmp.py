"""XMP packets that state how an image was made (ISO 16684-1).

Programs and websites that show images read them: the source type is a term of IPTC's vocabulary.
https://cv.iptc.org/newscodes/digitalsourcetype/
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from xml.etree import ElementTree

from openpulid import __version__

SOFTWARE = f"openpulid {__version__}"

MAX_XMP_BYTES = 2**20
"""The largest packet that is read."""

VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"

RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
SOURCE_TYPE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
CREATOR_TOOL = "{http://ns.adobe.com/xap/1.0/}CreatorTool"

# The identifier is the one that the specification requires (part 1, 7.3.2).
PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    Iptc4xmpExt:DigitalSourceType="{source_type}"
    xmp:CreatorTool="{software}"/>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


class DigitalSourceType(str, Enum):
    """How an image was made, as a term of IPTC's vocabulary."""

    GENERATED = "trainedAlgorithmicMedia"
    """By a trained model."""

    EDITED = "compositeWithTrainedAlgorithmicMedia"
    """From another image, by a trained model."""

    RENDERED = "algorithmicMedia"
    """By a program that has learned from no data."""

    @property
    def uri(self) -> str:
        """The term's identifier."""
        return VOCABULARY + self.value


@dataclass(frozen=True)
class XmpFacts:
    """What an XMP packet states about the origin of an image.

    Attributes:
        source_type: the identifier of IPTC's term, or whatever the packet has in its place.
        software: the program that made the image.
    """

    source_type: str | None = None
    software: str | None = None

    @property
    def is_empty(self) -> bool:
        """Whether the packet states neither."""
        return self.source_type is None and self.software is None


def create_packet(source_type: DigitalSourceType) -> str:
    """Return the packet of an image of this package."""
    return PACKET.format(source_type=source_type.uri, software=SOFTWARE)


def parse_packet(packet: bytes) -> XmpFacts:
    """Read a packet of any program.

    Raises:
        ValueError: it is too large, is not valid, or defines entities, which XMP does not use.
    """
    if len(packet) > MAX_XMP_BYTES:
        raise ValueError("the XMP packet is too large")
    text = packet.decode("utf-8").strip("\0 \ufeff")
    if "<!" in text.replace("<!--", ""):  # an entity can expand to gigabytes
        raise ValueError("the XMP packet has a document type")
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as error:
        raise ValueError(f"the XMP packet is damaged ({error})") from None
    facts: dict[str, str] = {}
    # the packet's own descriptions: deeper ones can be of ingredients
    tree = next(root.iter(f"{RDF}RDF"), root)
    for description in tree.findall(f"{RDF}Description"):
        facts.update(description.attrib)  # a simple property is an attribute, or an element
        for element in description:
            facts[element.tag] = element.get(f"{RDF}resource") or (element.text or "").strip()
    return XmpFacts(facts.get(SOURCE_TYPE) or None, facts.get(CREATOR_TOOL) or None)
