"""Faces in photographs: insightface's detector and recogniser, facexlib's parsing, and the crop that the vision tower sees.

The networks are those of the two libraries, on onnxruntime and on PyTorch. Both count a pixel's centre as a whole number,
`Face` counts its edge: they are half a pixel apart.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from openpulid.errors import WeightsError
from openpulid.faces.align import similarity, warp
from openpulid.faces.embed import FaceEmbedder
from openpulid.faces.face import Face
from openpulid.weights import read_tensors

LONGEST = 1024
"""Pixels of a photograph's longer side when it is read, at most (PuLID, released code): a recogniser's crop of 112 pixels takes
single ones of a larger photograph, not what lies between them."""

SIZES = (640, 512, 384, 256)
"""Widths of the square that a picture is fitted into, tried in this order: a large face is found in a small one."""

BORDER = 0.5
"""Width of the gray border, over the picture's longer side, in the last attempt: a crop as tight as the face needs air."""

CROP = 512
TEMPLATE = (
    (192.98138, 239.94708),
    (318.90277, 240.1936),
    (256.63416, 314.01935),
    (201.26117, 371.41043),
    (313.08905, 371.15118),
)
"""Where facexlib puts eyes, nose tip and mouth corners in a crop of 512 pixels (FFHQ's frame)."""

GROUND = (132, 133, 135)
"""RGB of what lies outside the photograph in such a crop, facexlib's."""

ARCFACE_CROP = 112
ARCFACE_TEMPLATE = torch.tensor(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
"""Where insightface puts the five landmarks in a crop of 112 pixels."""

NOT_FACE = (0, 16, 18, 7, 8, 9, 14, 15)
"""Labels of BiSeNet that become white: background, cloth, hat, ears, earring, neck, necklace (PuLID, released code)."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PhotoFinder:
    """SCRFD (arXiv 2105.04714), the detector of insightface's packs.

    Args:
        model: an insightface detection model.
        sizes: tried in this order until a face is found; then once more on a copy with a border.
        threshold: the smallest score that counts, 0 to 1.
    """

    def __init__(self, model: Any, sizes: Sequence[int] = SIZES, threshold: float = 0.5) -> None:
        self.model, self.sizes, self.threshold = model, tuple(sizes), threshold

    @classmethod
    def load(cls, file: str | os.PathLike[str], device: str | torch.device = "cpu", **options: Any) -> PhotoFinder:
        """From an ONNX file. Raises WeightsError when it is missing or no detector."""
        return cls(onnx_model(file, device, "detect"), **options)

    @property
    def tried(self) -> str:
        """What `find` does before it gives up, in words."""
        return f"sizes {', '.join(map(str, self.sizes))} and a copy with a border"

    def find(self, image: Tensor) -> list[Face]:
        """All faces at the first size that shows any.

        Args:
            image: (3, H, W) float in [0, 1].

        Returns:
            Faces without masks, the largest first; none is an empty list.
        """
        for size in self.sizes:
            if faces := self._at(image, image, size, 0):
                return faces
        margin = round(BORDER * max(image.shape[1:]))
        around = pad(image, (margin,) * 4, value=0.5)
        return next((faces for size in self.sizes if (faces := self._at(image, around, size, margin))), [])

    def _at(self, image: Tensor, shown: Tensor, size: int, margin: int) -> list[Face]:
        """Faces of `shown`, which is `image` with a margin, in pixels of `image`."""
        boxes, points = self.model.detect(pixels(shown)[..., ::-1], input_size=(size, size), det_thresh=self.threshold)
        height, width = image.shape[1:]
        faces = []
        for box, five in zip(torch.from_numpy(boxes).float(), torch.from_numpy(points).float(), strict=True):
            corners = box[:4] + 0.5 - margin
            corners = torch.minimum(corners.clamp(min=0), torch.tensor([width, height, width, height]))
            faces.append(Face(image, corners, five + 0.5 - margin, float(box[4])))
        return sorted(faces, key=lambda face: -face.area)


class ArcFace:
    """The recogniser of an insightface pack (arXiv 1801.07698): a face's raw embedding, not normalised."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def load(cls, file: str | os.PathLike[str], device: str | torch.device = "cpu") -> ArcFace:
        """From an ONNX file. Raises WeightsError when it is missing or no recogniser."""
        return cls(onnx_model(file, device, "get_feat"))

    def __call__(self, face: Face) -> Tensor:
        """(1, 512) float32."""
        from insightface.utils.face_align import norm_crop

        five = (face.landmarks - 0.5).numpy()
        crop = norm_crop(pixels(face.image)[..., ::-1], five, self.model.input_size[0])
        return torch.from_numpy(self.model.get_feat(crop)).float()


class FaceParser:
    """facexlib's BiSeNet (arXiv 1808.00897): which pixels of an aligned crop are face or hair."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval()

    @classmethod
    def load(cls, file: str | os.PathLike[str], device: str | torch.device = "cpu") -> FaceParser:
        """From `parsing_bisenet.pth`. Raises WeightsError when it is missing or of another network."""
        from facexlib.parsing.bisenet import BiSeNet

        network = BiSeNet(num_class=19)
        try:
            network.load_state_dict(read_tensors(file), strict=True)
        except RuntimeError as error:
            raise WeightsError(f"{file} is not facexlib's BiSeNet: {error}") from error
        return cls(network.to(device))

    @torch.no_grad()
    def __call__(self, crop: Tensor) -> Tensor:
        """(1, 3, 512, 512) in [0, 1] -> (1, 1, 512, 512) float, 1 where the crop is kept."""
        crop = crop.to(next(self.network.parameters()).device)
        mean, std = (crop.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        labels = self.network((crop - mean) / std)[0].argmax(1, keepdim=True)
        return (~torch.isin(labels, torch.tensor(NOT_FACE, device=crop.device))).float()


def arcface_crop(images: Tensor, masks: Tensor, landmarks: Tensor) -> Tensor:
    """Crops as facexlib's ArcFace wants them, differentiable in the images; the masks do not matter.

    Args:
        images: (B, 3, H, W) in [0, 1].
        landmarks: (B, 5, 2) in pixels.

    Returns:
        (B, 3, 112, 112) in [-1, 1], blue first.
    """
    matrix = similarity(landmarks, ARCFACE_TEMPLATE.to(landmarks) + 0.5)
    return 2 * warp(images, matrix, ARCFACE_CROP).flip(1) - 1


def photo_embedder(finder: PhotoFinder, recogniser: nn.Module) -> FaceEmbedder:
    """What the ID loss at full size sees: the largest face of each picture, through a recogniser that is not the encoder's."""

    def find(images: Tensor) -> list[Face | None]:
        return [next(iter(finder.find(image)), None) for image in images]

    return FaceEmbedder(find, recogniser, arcface_crop)


def arcface_ir_se50(file: str | os.PathLike[str], device: str | torch.device = "cpu") -> nn.Module:
    """facexlib's ArcFace, a residual network of 50 layers: (B, 3, 112, 112) in [-1, 1], blue first -> (B, 512).

    Raises:
        WeightsError: no such file, or of another network.
    """
    from facexlib.recognition.arcface_arch import Backbone

    network = Backbone(num_layers=50, drop_ratio=0.6, mode="ir_se")
    try:
        network.load_state_dict(read_tensors(file), strict=True)
    except RuntimeError as error:
        raise WeightsError(f"{file} is not facexlib's ArcFace: {error}") from error
    return network.eval().requires_grad_(False).to(device)


def aligned_photo(face: Face) -> Tensor:
    """(1, 3, 512, 512) float in [0, 1]: the face in FFHQ's frame, as facexlib cuts it out."""
    import cv2

    matrix = cv2.estimateAffinePartial2D((face.landmarks - 0.5).numpy(), np.array(TEMPLATE), method=cv2.LMEDS)[0]
    crop = cv2.warpAffine(pixels(face.image), matrix, (CROP, CROP), borderValue=GROUND)
    return torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255


def pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) float in [0, 1] -> (H, W, 3) uint8."""
    return np.ascontiguousarray((image.detach().cpu() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())


def onnx_model(file: str | os.PathLike[str], device: str | torch.device, wanted: str) -> Any:
    """A model of insightface's zoo on the device's provider, the CPU's where that cannot be had.

    Args:
        wanted: the method that such a model has.

    Raises:
        WeightsError: no such file, or another kind of model.
    """
    model = _opened(file, device)
    if not hasattr(model, wanted):
        raise WeightsError(f"{file} is a model of another kind ({type(model).__name__}); take the one that the pack names.")
    return model


def pack(folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The detector's and the recogniser's file in the folder of an insightface pack, whatever they are called; or in the one
    folder within, since antelopev2's archive unpacks so.

    Raises:
        WeightsError: it has not both.
    """
    kinds: dict[str, Path] = {}
    for file in sorted(Path(folder).glob("*.onnx")) or sorted(Path(folder).glob("*/*.onnx")):
        model = _opened(file, "cpu")
        kinds |= {kind: file for kind in ("detect", "get_feat") if hasattr(model, kind) and kind not in kinds}
    if len(kinds) < 2:
        raise WeightsError(
            f"{folder} is no pack of insightface; such a folder has a detector and a recogniser, as .onnx files."
        )
    return kinds["detect"], kinds["get_feat"]


def _opened(file: str | os.PathLike[str], device: str | torch.device) -> Any:
    import onnxruntime
    from insightface.model_zoo import get_model

    if not Path(file).is_file():
        raise WeightsError(f"{file} is not there; `pulid weights get sdxl` says where it comes from.")
    onnxruntime.set_default_logger_severity(3)
    try:
        model = get_model(os.fspath(file), providers=providers(device, onnxruntime.get_available_providers()))
    except Exception as error:  # protobuf, onnxruntime and insightface each have their own
        raise WeightsError(f"{file} cannot be opened ({str(error).splitlines()[0]}); get it again.") from error
    return model


def providers(device: str | torch.device, available: Sequence[str]) -> list[str | tuple[str, dict[str, int]]]:
    """onnxruntime's names for a device of PyTorch's, with its number if it has one; the CPU always last."""
    device = torch.device(device)
    wanted = {
        "cuda": ("CUDAExecutionProvider", "MIGraphXExecutionProvider", "ROCMExecutionProvider"),
        "mps": ("CoreMLExecutionProvider",),
    }
    first = [name for name in wanted.get(device.type, ()) if name in available]
    numbered = [(name, {"device_id": device.index}) if device.index else name for name in first[:1]]
    return [*numbered, "CPUExecutionProvider"]
