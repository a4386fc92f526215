"""What is stored of each image: the columns of the tables that the stages pass on."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow

EMBEDDING = "embedding"
"""Column of the face embedding."""

KEPT = "kept"
DUPLICATE = "duplicate"
NO_CAPTION = "no_caption"

DECISIONS = {
    KEPT: "in the dataset",
    "unreadable": "cannot be opened as an image",
    "aspect": "too wide or too high",
    "no_face": "no face",
    "many_faces": "too many faces",
    "uncertain_face": "the detector is not sure of the face",
    "small_face": "the face is too small",
    "turned": "the image is not upright",
    "pose": "the head is turned or tilted too far",
    "blurred": "the face is blurred",
    "occluded": "the face is hidden in part",
    "small_crop": "the crop is too small",
    DUPLICATE: "another image is the same",
    NO_CAPTION: "no caption",
}
"""All decisions on an image and what they mean, in the order of the checks."""


@dataclass(slots=True)
class ImageRecord:
    """One image of the sources.

    Attributes:
        name: see `SourceImage`.
        key: hash of the name; the file name in the dataset.
        folder: see `SourceImage`.
        version: see `SourceImage`.
        decision: a key of `DECISIONS`.
        error: why the image cannot be opened.
        width: of the image in pixels.
        height: of the image in pixels.
        phash: perceptual hash, 64 bits.
        num_faces: faces of at least the least confidence, or one below it.
        face_size: shorter side of the face in pixels of the image, as the following of the largest
            face.
        score: confidence of the detector.
        sharpness: see `faces.quality.sharpness`.
        yaw: in degrees, see `faces.head_pose`.
        pitch: in degrees.
        roll: in degrees.
        occlusion: hidden part of the face, 0 to 1.
        box: x1, y1, x2, y2 of the face in the crop.
        landmarks: of the face in the crop: x and y of five points.
        embedding: of the face, normalized; only in the results of a batch.
        crop_width: of the image in the dataset, in pixels.
        crop_height: of the image in the dataset, in pixels.
        caption: given or generated.
        captioner: the model that generated the caption; empty for a given one.
        identity_words: words of the caption that describe who the person is.
        person: key of the person; images of one person have the same.
        duplicate_of: name of the image that is kept instead.
        split: "train" or "held-out".
        file: the shard, or the archive of a batch while a dataset is prepared.
        offset: of the image's content in this file.
        size: of the image's content in bytes.
    """

    name: str
    key: str
    folder: str = ""
    version: int = 0
    decision: str = KEPT
    error: str = ""
    width: int = 0
    height: int = 0
    phash: int = 0
    num_faces: int = 0
    face_size: float | None = None
    score: float | None = None
    sharpness: float | None = None
    yaw: float | None = None
    pitch: float | None = None
    roll: float | None = None
    occlusion: float | None = None
    box: list[float] = field(default_factory=list)
    landmarks: list[float] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)
    crop_width: int = 0
    crop_height: int = 0
    caption: str = ""
    captioner: str = ""
    identity_words: list[str] = field(default_factory=list)
    person: str = ""
    duplicate_of: str = ""
    split: str = ""
    file: str = ""
    offset: int = -1
    size: int = -1

    @property
    def is_kept(self) -> bool:
        """Whether the image has passed all checks so far."""
        return self.decision == KEPT


def record_schema() -> pyarrow.Schema:
    """Return the types of the columns of a table of records."""
    import pyarrow

    types = {
        "str": pyarrow.string(),
        "int": pyarrow.int64(),
        "float | None": pyarrow.float32(),
        "list[float]": pyarrow.list_(pyarrow.float32()),
        "list[str]": pyarrow.list_(pyarrow.string()),
    }
    columns = [(item.name, types[str(item.type)]) for item in fields(ImageRecord)]
    return pyarrow.schema(
        (name, pyarrow.uint64() if name == "phash" else kind) for name, kind in columns
    )


def to_table(records: list[ImageRecord]) -> pyarrow.Table:
    """Convert records to a table."""
    import pyarrow

    schema = record_schema()
    columns: dict[str, Any] = {
        name: [getattr(record, name) for record in records] for name in schema.names
    }
    return pyarrow.table(columns, schema=schema)


def from_table(table: pyarrow.Table) -> list[ImageRecord]:
    """Convert a table to records; other columns are ignored."""
    names = [name for name in record_schema().names if name in table.column_names]
    return [ImageRecord(**row) for row in table.select(names).to_pylist()]
