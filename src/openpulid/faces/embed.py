"""Face embeddings that are differentiable in the images, as an ID loss needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from openpulid.faces.align import GRAY, align_faces, crop_faces, replace_background
from openpulid.faces.augment import dilate, sample_jitter, vary_face
from openpulid.faces.face import Face, first_usable
from openpulid.faces.miniature import CROP

# (B, 3, H, W) in [0, 1] -> a face or None for each image
Detect = Callable[[Tensor], Sequence[Face | None]]
# (B, 3, H, W) in [0, 1] -> probability of the face at each pixel (B, 1, H, W), differentiable
Segment = Callable[[Tensor], Tensor]
# images (B, 3, H, W), masks (B, 1, H, W), landmarks (B, 5, 2), generator or None -> crops
Crop = Callable[[Tensor, Tensor, Tensor, Generator | None], Tensor]


@dataclass(frozen=True)
class FaceEmbeddings:
    """The faces of B images.

    Attributes:
        has_face: (B,) bool, whether a face was detected.
        embeddings: (B, D) of the face recognition model; zero where there is no face, and (B, 1) if
            there is none in any image. Those of several models are normalized and joined, so that a
            cosine is the mean of theirs.
        masks: (B, 1, H, W), one on the pixels of the face, if the detector returns masks.
    """

    has_face: Tensor
    embeddings: Tensor
    masks: Tensor


def copy_paste(images: Tensor, second: Tensor, references: Tensor, eps: float = 1e-3) -> Tensor:
    """Compute whether generated images copy the reference image instead of the identity.

    (angle(image, second) - angle(image, reference)) / max(angle(second, reference), eps), between
    the angles of face embeddings. This is Copy-Paste of MultiID-Bench (arXiv 2510.14975).
    Similarity to the reference image alone rewards pasting it; this metric compares it with the
    similarity to a second image of the same person.

    Args:
        images: (B, D) embeddings of the generated images.
        second: (B, D) of second images of the people.
        references: (B, D) of the reference images.
        eps: smallest angle between the latter two, in radians.

    Returns:
        (B,), from -1 to 1.
    """
    spread = _angle(second, references).clamp(min=eps)
    return (_angle(images, second) - _angle(images, references)) / spread


def _angle(a: Tensor, b: Tensor) -> Tensor:
    return cosine_similarity(a.float(), b.float(), dim=-1).clamp(-1, 1).arccos()


def crop_masked(
    images: Tensor, masks: Tensor, landmarks: Tensor, generator: Generator | None = None
) -> Tensor:
    """Crop faces for the miniature's face recognition models: all but the face is gray.

    With a generator, position, colors and sharpness of each crop are random.
    """
    if generator is None:
        return align_faces(images, masks, landmarks, CROP)
    jitter = sample_jitter(len(images), CROP, generator)
    crops, crop_masks = crop_faces(images, masks, landmarks, CROP, jitter)
    faces = vary_face(crops, generator)
    return replace_background(faces, dilate(crop_masks, generator), GRAY)


class FaceEmbedder:
    """Detects, crops and embeds the faces of images.

    The position of the face carries no gradient, its appearance does. A model that sees no
    background sees the outline of a face in its mask alone, so the outline carries gradient only
    with `segment`.

    Args:
        detect: images -> a `Face` or None each, such as `MiniFaceDetector.detect`; runs without
            gradient.
        models: face recognition models, crops -> (B, D); they are frozen.
        crop: differentiable warp of the images to the template of the models.
        segment: images -> probabilities of the face, such as `MiniFaceDetector.segment`; the
            gradient of the masks is theirs. None if `crop` uses no masks, or needs no gradient.
    """

    def __init__(
        self,
        detect: Detect,
        *models: nn.Module,
        crop: Crop = crop_masked,
        segment: Segment | None = None,
    ) -> None:
        self.detect = detect
        self.models = [model.eval().requires_grad_(False) for model in models]
        self.crop = crop
        self.segment = segment

    def __call__(self, images: Tensor, generator: Generator | None = None) -> FaceEmbeddings:
        """Embed the faces of images.

        A texture that pleases a face recognition model but not the eye gains nothing in another
        view of the face.

        Args:
            images: (B, 3, H, W), which are clamped to [0, 1].
            generator: each model sees the faces in a random view; None for the plain view.
        """
        images = images.clamp(0, 1)
        with torch.no_grad():
            faces = self.detect(images.detach())
        # a crop of a face without usable landmarks would not be finite
        faces = [first_usable([face] if face else []) for face in faces]
        has_face = torch.tensor([face is not None for face in faces], device=images.device)
        masks = images.new_zeros(len(images), 1, *images.shape[2:])
        for mask, face in zip(masks, faces, strict=True):
            if face is not None and face.mask is not None:
                mask.copy_(face.mask)
        landmarks = [face.landmarks for face in faces if face is not None]
        if not landmarks:
            # Zeros that are still a function of the images, so that backward works.
            zeros = 0 * images.mean((1, 2, 3))[:, None]
            return FaceEmbeddings(has_face, zeros, masks)

        points = torch.stack(landmarks).to(images)
        outlines = masks
        if self.segment is not None and images.requires_grad:
            outlines = with_gradient_of(masks, self.segment(images))
        inputs = (images[has_face], outlines[has_face], points)
        values = embed_crops(self.models, self.crop, inputs, generator)
        rows = has_face.nonzero()[:, 0]
        embeddings = values.new_zeros(len(images), values.shape[1]).index_put((rows,), values)
        return FaceEmbeddings(has_face, embeddings, masks)


def with_gradient_of(masks: Tensor, probabilities: Tensor) -> Tensor:
    """Return masks with the gradient of the probabilities that they were rounded from.

    The straight-through estimator of Bengio et al. (arXiv 1308.3432).

    Args:
        masks: (B, 1, H, W), zero or one.
        probabilities: (B, 1, H, W).
    """
    return masks + probabilities - probabilities.detach()


def embed_crops(
    models: Sequence[nn.Module],
    crop: Crop,
    faces: tuple[Tensor, Tensor, Tensor],
    generator: Generator | None = None,
) -> Tensor:
    """Embed one face of each image with each model, see `FaceEmbeddings.embeddings`.

    Args:
        models: face recognition models.
        crop: for all of them.
        faces: images (B, 3, H, W), masks (B, 1, H, W), landmarks (B, 5, 2).
        generator: see `FaceEmbedder`.

    Returns:
        (B, D) float32.
    """
    with torch.autocast(faces[0].device.type, enabled=False):
        if generator is None:
            crops = [crop(*faces, None)] * len(models)
        else:
            crops = [crop(*faces, generator) for _ in models]
    values = [model(view).float() for model, view in zip(models, crops, strict=True)]
    if len(values) == 1:
        return values[0]
    return torch.cat([normalize(value, dim=-1) for value in values], 1)
