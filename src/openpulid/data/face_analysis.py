"""Detect the faces of an image, measure the largest, and embed it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch.nn.functional import normalize

from openpulid.data.face_models import FaceModels
from openpulid.data.options import Filters
from openpulid.data.records import ImageRecord
from openpulid.faces.face import Face, first_usable
from openpulid.faces.head_pose import estimate_head_pose
from openpulid.faces.quality import sharpness
from openpulid.io.image_grid import to_tensor
from openpulid.io.images import limit_size


class FaceAnalyzer:
    """Measures and embeds the largest face of each image, and applies the filters.

    Slow models run only on the images that have passed the filters before.

    Args:
        models: the face models.
        filters: which images are dropped.
    """

    def __init__(self, models: FaceModels, filters: Filters) -> None:
        self.models = models
        self.filters = filters

    def analyze(self, record: ImageRecord, image: Image.Image) -> None:
        """Complete the record of an image; box and landmarks are in its pixels.

        Args:
            record: the record.
            image: the image.

        Raises:
            FaceError: the landmarks of the face cannot be aligned.
        """
        detection = self.models.detection
        small = limit_size(image, detection.max_image_size or max(image.size))
        faces = detection.detect(to_tensor([small])[0])
        face = first_usable(faces)
        if face is None:
            record.decision = "no_face"
            return
        scale = image.width / small.width
        self._measure(record, face, faces, scale)
        record.decision = self._find_problem(record, face) or record.decision
        if not record.is_kept:
            return
        if self.filters.max_occlusion < 1:
            record.occlusion = self.models.measure_occlusion(face)
            if record.occlusion > self.filters.max_occlusion:
                record.decision = "occluded"
                return
        record.embedding = normalize(self.models.embed(face), dim=0).tolist()

    def _measure(
        self, record: ImageRecord, face: Face, faces: Sequence[Face], scale: float
    ) -> None:
        certain = [other for other in faces if other.score >= self.filters.min_score]
        record.num_faces = max(len(certain), 1)
        record.face_size = face.shorter_side * scale
        record.score = face.score
        record.sharpness = min(sharpness(face), 1.0)
        record.yaw, record.pitch, record.roll = estimate_head_pose(face.landmarks)
        record.box = [value * scale for value in face.box.tolist()]
        record.landmarks = [value * scale for value in face.landmarks.flatten().tolist()]

    def _find_problem(self, record: ImageRecord, face: Face) -> str | None:
        """Return the first filter that a face does not pass."""
        filters = self.filters
        assert record.face_size is not None and record.sharpness is not None
        angles = (record.yaw or 0, record.pitch or 0, record.roll or 0)
        limits = (filters.max_yaw, filters.max_pitch, filters.max_roll)
        problems = {
            "many_faces": record.num_faces > filters.max_faces,
            "uncertain_face": face.score < filters.min_score,
            "small_face": record.face_size < filters.min_face,
            "turned": face.turns != 0,
            # also if an angle is NaN
            "pose": not all(abs(a) <= limit for a, limit in zip(angles, limits, strict=True)),
            "blurred": record.sharpness < filters.min_sharpness,
        }
        return next((name for name, is_found in problems.items() if is_found), None)
