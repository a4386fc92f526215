"""What the benchmark measures: each measure a small class with its definition and source. Networks come in as plain
callables; a measure gives one number per image.

Shapes: B images, P people, D features; images are (B, 3, H, W) floats in [0, 1].
"""

from openpulid.bench.metrics.bootstrap import Interval, bootstrap
from openpulid.bench.metrics.identity import (
    FGIS,
    CopyPaste,
    FaceDiversity,
    FaceFound,
    FaceSim,
    FacialValues,
    Rank1,
)
from openpulid.bench.metrics.inputs import (
    EmbedImages,
    EmbedTexts,
    Faces,
    FindFaces,
    Metric,
    MetricInputs,
    ReadAttributes,
)
from openpulid.bench.metrics.preservation import (
    FID,
    Attributes,
    ClipI,
    ClipT,
    Dino,
    LpipsOutside,
    OutsideFace,
    attributes_seen,
)

COLUMNS = (
    FaceSim, Rank1, FacialValues, FGIS, FaceDiversity, CopyPaste, ClipT, ClipI, Dino, OutsideFace,
    LpipsOutside, Attributes, FaceFound, FID,
)  # fmt: skip
"""All of them, in the order of a report's columns."""
LIKENESS = frozenset(
    measure.name for measure in (FaceSim, Rank1, FacialValues, FGIS, FaceDiversity, CopyPaste)
)
"""Whose face it is; a suite may name prompts for these alone."""

__all__ = [
    "COLUMNS",
    "LIKENESS",
    "FGIS",
    "FID",
    "Attributes",
    "ClipI",
    "ClipT",
    "CopyPaste",
    "Dino",
    "EmbedImages",
    "EmbedTexts",
    "MetricInputs",
    "FaceDiversity",
    "FaceFound",
    "FaceSim",
    "Faces",
    "FacialValues",
    "FindFaces",
    "Interval",
    "LpipsOutside",
    "Metric",
    "OutsideFace",
    "Rank1",
    "ReadAttributes",
    "attributes_seen",
    "bootstrap",
]
