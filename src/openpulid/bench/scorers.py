"""Metric models for photos: published networks, whose face recognition model no method uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.transforms import Normalize

from openpulid.bench import metrics
from openpulid.bench.metrics import FID, EmbedImages, EmbedTexts, Faces, Metric
from openpulid.bench.metrics.inputs import Distance
from openpulid.bench.suite import Recognition
from openpulid.errors import WeightsError, explain_missing_library
from openpulid.faces.align import similarity_transform, warp_images
from openpulid.faces.arcface import ARCFACE_CROP, ARCFACE_TEMPLATE
from openpulid.faces.face import Face, first_usable
from openpulid.faces.photo_detector import PhotoDetector, load_photo_detector
from openpulid.faces.sface import SFaceRecognition
from openpulid.io.checkpoints import load_state, read_tensors
from openpulid.io.hub import locate
from openpulid.io.networks import load_network

BATCH_SIZE = 8

RECOGNITION_WEIGHTS: Mapping[Recognition, tuple[str, ...]] = {
    "curricularface": ("detector", "scorer-recognition"),
    "sface": ("yunet", "scorer-sface"),
}
"""Published weights of the face detector and face recognition model."""

OPTIONAL_WEIGHTS = ("scorer-clip", "scorer-dino", "scorer-lpips", "scorer-inception")
"""Published weights of further metrics, which are left out without them."""

Model = TypeVar("Model")


class PhotoFaces:
    """Detects and embeds the largest face of each image: `bench.metrics.DetectFaces`.

    The mask of a face is its bounding box.

    Args:
        detector: detects faces in (3, H, W).
        recognition: face recognition model, (B, 3, 112, 112) in [-1, 1] -> (B, D).
    """

    def __init__(self, detector: PhotoDetector, recognition: nn.Module) -> None:
        self.detector = detector
        self.recognition = recognition.eval().requires_grad_(False)
        # SFace has no parameters in PyTorch
        self.device = next((x.device for x in recognition.parameters()), torch.device("cpu"))
        blank = torch.zeros(1, 3, ARCFACE_CROP, ARCFACE_CROP, device=self.device)
        with torch.no_grad():
            self.no_face = torch.zeros_like(recognition(blank)[0].float().cpu())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Faces:
        """Detect and embed the faces of images (B, 3, H, W) in [0, 1].

        Embeddings of images without a face are zero.
        """
        faces = [first_usable(self.detector.detect_upright(image)) for image in images]
        masks = torch.zeros(len(images), 1, *images.shape[2:])
        embeddings: list[Tensor] = []
        for row, face in enumerate(faces):
            if face is None:
                embeddings.append(self.no_face)
                continue
            left, top, right, bottom = face.box.round().int().tolist()
            masks[row, :, top:bottom, left:right] = 1
            embeddings.append(self._embed(images[row : row + 1], face))
        has_face = torch.tensor([face is not None for face in faces])
        return Faces(has_face, torch.stack(embeddings), masks)

    def _embed(self, image: Tensor, face: Face) -> Tensor:
        transform = similarity_transform(face.landmarks[None], ARCFACE_TEMPLATE + 0.5)
        crop = warp_images(image, transform, ARCFACE_CROP)
        return self.recognition((2 * crop - 1).to(self.device))[0].float().cpu()


@dataclass(frozen=True)
class PhotoScorers:
    """`bench.score.Scorers` for photos; metrics whose model is None are left out.

    Attributes:
        faces: face detector and face recognition model.
        embed_images: CLIP's vision encoder.
        embed_texts: CLIP's text encoder.
        dino: DINO ViT-S/16.
        lpips: LPIPS on AlexNet.
        inception: Inception features for the FID.
    """

    faces: PhotoFaces
    embed_images: EmbedImages | None = None
    embed_texts: EmbedTexts | None = None
    dino: EmbedImages | None = None
    lpips: Distance | None = None
    inception: EmbedImages | None = None

    def metrics(self) -> list[Metric]:
        """Return all metrics whose models are installed."""
        available: list[Metric] = [
            metrics.FaceSim(),
            metrics.SimGT(),
            metrics.Rank1(),
            metrics.CopyPaste(),
            metrics.OutsideFace(),
            metrics.FaceFound(),
        ]
        if self.embed_images and self.embed_texts:
            available.append(metrics.ClipT(self.embed_images, self.embed_texts))
            available.append(metrics.ClipI(self.embed_images))
        if self.dino:
            available.append(metrics.Dino(self.dino))
            available.append(metrics.FGIS(self.dino))
        if self.lpips:
            available.append(metrics.LpipsOutside(self.lpips))
            available.append(metrics.FaceDiversity(self.lpips))
        return available

    def method_metrics(self) -> list[FID]:
        """Return a new FID on Inception features."""
        return [metrics.FID(self.inception)] if self.inception else []

    def facial_values(self, people: Sequence[str]) -> None:
        """Return None: photos have no true facial parameters."""

    def attribute_classes(self, attributes: Mapping[str, str]) -> dict[str, int]:
        """Return nothing: there is no attribute classifier for photos."""
        return {}

    @classmethod
    def load(
        cls,
        device: torch.device,
        say: Callable[[str], None] = print,
        recognition: Recognition = "curricularface",
    ) -> PhotoScorers:
        """Load the models whose weights are installed; nothing is downloaded.

        Args:
            device: where to run them.
            say: receives a message for each model that is missing.
            recognition: see `Suite`.

        Raises:
            WeightsError: the face detector or the face recognition model is missing, without
                which no identity can be measured.
        """
        faces = load_faces(recognition, device)

        def load_optional(columns: str, load: Callable[[], Model]) -> Model | None:
            try:
                return load()
            except WeightsError as error:
                say(f"not measured: {columns} ({error})")
                return None

        clip = load_optional("CLIP-T and CLIP-I", lambda: load_clip(locate("scorer-clip"), device))
        dino = load_optional("DINO and FGIS", lambda: load_dino(locate("scorer-dino"), device))
        lpips = load_optional(
            "LPIPS and Face Div", lambda: load_lpips(locate("scorer-lpips"), device)
        )
        inception = load_optional("FID", lambda: load_inception(locate("scorer-inception"), device))
        embed_images, embed_texts = clip or (None, None)
        return cls(faces, embed_images, embed_texts, dino, lpips, inception)


def load_faces(recognition: Recognition, device: torch.device) -> PhotoFaces:
    """Load a face recognition model that no method uses, and a detector of the same license.

    Raises:
        WeightsError: one of them is missing.
    """
    if recognition == "sface":
        detector = load_photo_detector(locate("yunet"))
        return PhotoFaces(detector, SFaceRecognition.load(locate("scorer-sface")))
    detector = load_photo_detector(locate("detector"), device)
    try:
        path = locate("scorer-recognition")
    except WeightsError as error:
        raise WeightsError(f"{error} Or score with SFace: --recognition sface.") from None
    return PhotoFaces(detector, load_curricular_face(path).to(device))


def load_curricular_face(path: Path) -> nn.Module:
    """Load CurricularFace (arXiv 2004.00288), a residual network of 100 layers.

    Returns:
        (B, 3, 112, 112) in [-1, 1] -> (B, 512).

    Raises:
        WeightsError: the file belongs to another network.
    """
    with explain_missing_library():
        from facexlib.recognition.arcface_arch import Backbone

    network = Backbone(num_layers=100, drop_ratio=0.4, mode="ir")
    network.output_layer[4] = nn.BatchNorm1d(512, affine=False)
    load_state(network, read_tensors(path), f"{path} is not CurricularFace's backbone")
    return network


def load_clip(folder: Path, device: torch.device) -> tuple[EmbedImages, EmbedTexts]:
    """Load CLIP ViT-L/14 in transformers format.

    Returns:
        The functions that embed images and prompts.

    Raises:
        WeightsError: the folder contains no CLIP.
    """
    from transformers import AutoTokenizer, CLIPModel

    model = load_network(CLIPModel, folder, torch.float32).eval().to(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} contains no CLIP; download it again.") from error

    @torch.no_grad()
    def embed_texts(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        hidden = model.text_model(**tokens.to(device)).pooler_output
        return model.text_projection(hidden).float().cpu()

    def embed_pixels(pixels: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    size = model.config.vision_config.image_size
    normalize = Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    return image_embedder(embed_pixels, size, normalize, device), embed_texts


def load_dino(path: Path, device: torch.device) -> EmbedImages:
    """Load DINO ViT-S/16 (arXiv 2104.14294) into timm's model; it embeds by the class token.

    Raises:
        WeightsError: the file belongs to another network.
    """
    import timm

    model = timm.create_model("vit_small_patch16_224.dino", num_classes=0, dynamic_img_size=True)
    load_state(model, read_tensors(path), f"{path} is not DINO's ViT-S/16")
    normalize = Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return image_embedder(model.eval().to(device), 224, normalize, device)


def load_lpips(path: Path, device: torch.device) -> Distance:
    """Load LPIPS (arXiv 1801.03924) on AlexNet.

    Its own weights are part of the library `lpips`; the file has AlexNet's.

    Raises:
        WeightsError: lpips is not installed, or the file belongs to another network.
    """
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise WeightsError("part of LPIPS is in the library lpips; `pip install lpips`") from error

    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    tensors = read_tensors(path)
    # lpips splits AlexNet's features into slices, whose layers keep their indices
    state: dict[str, Tensor] = {}
    for name, _ in model.net.named_parameters():
        layer = name.split(".", 1)[1]
        state[name] = tensors.get(f"features.{layer}", torch.empty(0))
    load_state(model.net, state, f"{path} is not torchvision's AlexNet")
    model = model.eval().to(device)

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        distances = []
        for x, y in zip(a.split(BATCH_SIZE), b.split(BATCH_SIZE), strict=True):
            distances.append(model(x.to(device), y.to(device), normalize=True).flatten().cpu())
        return torch.cat(distances)

    return distance


def load_inception(path: Path, device: torch.device) -> EmbedImages:
    """Load the Inception network of the original FID (arXiv 1706.08500): pooling layer of 2048.

    Raises:
        WeightsError: torch-fidelity is not installed.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path)).to(device)
    except ModuleNotFoundError as error:
        raise WeightsError(
            "the network is in torch-fidelity; `pip install torch-fidelity`"
        ) from error

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        features = []
        for batch in images.split(BATCH_SIZE):
            pixels = (batch * 255).round().clamp(0, 255).byte()
            features.append(model(pixels.to(device)).cpu())
        return torch.cat(features)

    return embed


def image_embedder(
    network: Callable[[Tensor], Tensor],
    size: int,
    normalize: Normalize,
    device: torch.device,
) -> EmbedImages:
    """Return a function that resizes, normalizes and embeds images in small batches.

    Args:
        network: (B, 3, size, size), normalized -> (B, D).
        size: input size of the network in pixels.
        normalize: with the network's mean and standard deviation of each channel.
        device: device of the network.
    """

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        embeddings = []
        for batch in images.split(BATCH_SIZE):
            resized = interpolate(batch.float(), (size, size), mode="bicubic", antialias=True)
            pixels = normalize(resized.clamp(0, 1).to(device))
            embeddings.append(network(pixels).float().cpu())
        return torch.cat(embeddings)

    return embed
