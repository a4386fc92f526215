"""The benchmark's metrics.

Each metric is a small class with its definition and source. Networks are passed in as plain
callables; a metric computes one number per image.

Shapes: B images, P subjects, D features; images are (B, 3, H, W) floats in [0, 1].
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
    Rank1Of8,
    SimGT,
)
from openpulid.bench.metrics.inputs import (
    ClassifyAttributes,
    DetectFaces,
    EmbedImages,
    EmbedTexts,
    Faces,
    Metric,
    MetricInputs,
)
from openpulid.bench.metrics.preservation import (
    FID,
    Attributes,
    ClipI,
    ClipT,
    Dino,
    LpipsOutside,
    OutsideFace,
    attribute_accuracy,
)

COLUMNS = (
    FaceSim, SimGT, Rank1, FacialValues, FGIS, FaceDiversity, CopyPaste, ClipT, ClipI, Dino,
    OutsideFace, LpipsOutside, Attributes, FaceFound, FID,
)  # fmt: skip
"""All metrics in the order of a report's columns."""

IDENTITY_METRICS = frozenset(
    metric.name for metric in (FaceSim, SimGT, Rank1, FacialValues, FGIS, FaceDiversity, CopyPaste)
)
"""Names of the metrics of identity; a suite may name prompts for these alone."""

__all__ = [
    "COLUMNS",
    "IDENTITY_METRICS",
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
    "DetectFaces",
    "Interval",
    "LpipsOutside",
    "Metric",
    "OutsideFace",
    "Rank1",
    "Rank1Of8",
    "SimGT",
    "ClassifyAttributes",
    "attribute_accuracy",
    "bootstrap",
]
