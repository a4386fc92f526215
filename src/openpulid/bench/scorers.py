"""The judges of photographs: published networks; no method uses the recogniser. What is not here is left out, and
said."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from openpulid.bench import metrics
from openpulid.bench.metrics import FID, EmbedImages, EmbedTexts, Faces, Metric
from openpulid.bench.metrics.inputs import Distance
from openpulid.errors import WeightsError
from openpulid.faces.align import similarity_transform, warp_images
from openpulid.faces.arcface import ARCFACE_CROP, ARCFACE_TEMPLATE
from openpulid.faces.face import Face
from openpulid.faces.scrfd import SCRFDDetector
from openpulid.identity.eva_clip import CLIP_MEAN, CLIP_STD
from openpulid.io.checkpoints import read_tensors
from openpulid.io.hub import locate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which DINO learned with


class PhotoFaces:
    """The largest face of each image and whose it is: `bench.metrics.FindFaces`. Its mask is the detector's box.

    Args:
        finder: finds faces in (3, H, W).
        recogniser: (B, 3, 112, 112) in [-1, 1] -> (B, D).
    """

    def __init__(self, finder: SCRFDDetector, recogniser: nn.Module) -> None:
        self.finder, self.recogniser = finder, recogniser.eval().requires_grad_(False)
        self.device = next(recogniser.parameters()).device
        with torch.no_grad():
            self.nobody = (
                recogniser(torch.zeros(1, 3, ARCFACE_CROP, ARCFACE_CROP, device=self.device))[0]
                .float()
                .cpu()
                * 0
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Faces:
        """(B, 3, H, W) in [0, 1] -> Faces; embeddings of images without a face are zero."""
        faces: list[Face | None] = [next(iter(self.finder.detect(image)), None) for image in images]
        found = torch.tensor([face is not None for face in faces])
        masks = torch.zeros(len(images), 1, *images.shape[2:])
        embeddings: list[Tensor] = []
        for row, face in enumerate(faces):
            if face is None:
                embeddings.append(self.nobody)
                continue
            left, top, right, bottom = face.box.round().int().tolist()
            masks[row, :, top:bottom, left:right] = 1
            crop = warp_images(
                images[row : row + 1],
                similarity_transform(face.landmarks[None], ARCFACE_TEMPLATE + 0.5),
                ARCFACE_CROP,
            )
            embeddings.append(self.recogniser((2 * crop - 1).to(self.device))[0].float().cpu())
        return Faces(found, torch.stack(embeddings), masks)


@dataclass(frozen=True)
class PhotoScorers:
    """`bench.judging.Scorers` of photographs; what is None is not measured.

    Attributes:
        faces: finds and recognises.
        embed_images, embed_texts: CLIP's.
        dino: DINO ViT-S/16's.
        lpips: AlexNet's.
        inception: features for the FID.
    """

    faces: PhotoFaces
    embed_images: EmbedImages | None = None
    embed_texts: EmbedTexts | None = None
    dino: EmbedImages | None = None
    lpips: Distance | None = None
    inception: EmbedImages | None = None

    def measures(self) -> list[Metric]:
        """All that can be told with the networks that are here."""
        found: list[Metric] = [
            metrics.FaceSim(), metrics.Rank1(), metrics.CopyPaste(), metrics.OutsideFace(), metrics.FaceFound()
        ]  # fmt: skip
        if self.embed_images and self.embed_texts:
            found += [
                metrics.ClipT(self.embed_images, self.embed_texts),
                metrics.ClipI(self.embed_images),
            ]
        if self.dino:
            found += [metrics.Dino(self.dino), metrics.FGIS(self.dino)]
        if self.lpips:
            found += [metrics.LpipsOutside(self.lpips), metrics.FaceDiversity(self.lpips)]
        return found

    def sets(self) -> list[FID]:
        """FID of Inception's features."""
        return [metrics.FID(self.inception)] if self.inception else []

    def truth(self, people: Sequence[str]) -> None:
        """Nobody knows the numbers of a photographed face."""

    def wanted(self, named: Mapping[str, str]) -> dict[str, int]:
        """Nothing: there is no reader of what photographs show."""
        return {}

    @classmethod
    def load(cls, device: torch.device, say: Callable[[str], None] = print) -> PhotoScorers:
        """Those whose weights are on this machine; no network is asked.

        Args:
            say: told what is missing, and what is not measured for it.

        Raises:
            WeightsError: the detector or the recogniser is missing: nothing can be told of faces.
        """
        faces = PhotoFaces(
            SCRFDDetector.load(locate("detector"), device),
            curricular_face(locate("scorer-recognition")).to(device),
        )
        makers: dict[str, Callable[[], Sequence[Any]]] = {
            "CLIP-T and CLIP-I": lambda: clip_judge(locate("scorer-clip"), device),
            "DINO and FGIS": lambda: [dino_judge(locate("scorer-dino"), device)],
            "LPIPS and Face Div": lambda: [lpips_judge(locate("scorer-lpips"), device)],
            "FID": lambda: [inception_judge(locate("scorer-inception"), device)],
        }
        made: dict[str, Sequence[Any]] = {}
        for what, make in makers.items():
            try:
                made[what] = make()
            except WeightsError as error:
                say(f"not measured: {what} ({error})")
        clip = made.get("CLIP-T and CLIP-I", (None, None))
        rest = (
            made.get(what, (None,))[0] for what in ("DINO and FGIS", "LPIPS and Face Div", "FID")
        )
        return cls(faces, *clip, *rest)


def curricular_face(file: Path) -> nn.Module:
    """CurricularFace (arXiv 2004.00288), a residual network of 100 layers: (B, 3, 112, 112) in [-1, 1] -> (B, 512).

    Raises:
        WeightsError: another network's file.
    """
    from facexlib.recognition.arcface_arch import Backbone

    network = Backbone(num_layers=100, drop_ratio=0.4, mode="ir")
    network.output_layer[4] = nn.BatchNorm1d(512, affine=False)
    try:
        network.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        raise WeightsError(f"{file} is not CurricularFace's backbone: {error}") from error
    return network


def clip_judge(folder: Path, device: torch.device) -> tuple[EmbedImages, EmbedTexts]:
    """CLIP ViT-L/14 of transformers, for pictures and for prompts."""
    from transformers import AutoTokenizer, CLIPModel

    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} holds no CLIP; get it again.") from error

    @torch.no_grad()
    def texts(prompts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(
            device
        )
        return model.text_projection(model.text_model(**tokens).pooler_output).float().cpu()

    def seen(pixels: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)

    return each(seen, model.config.vision_config.image_size, CLIP_MEAN, CLIP_STD, device), texts


def dino_judge(file: Path, device: torch.device) -> EmbedImages:
    """DINO ViT-S/16 (arXiv 2104.14294) of timm: the class token."""
    import timm

    try:
        model = timm.create_model(
            "vit_small_patch16_224.dino", num_classes=0, dynamic_img_size=True
        )
        model.load_state_dict(read_tensors(file))
    except RuntimeError as error:
        raise WeightsError(f"{file} is not DINO's ViT-S/16: {error}") from error
    return each(model.eval().to(device), 224, MEAN, STD, device)


def lpips_judge(file: Path, device: torch.device) -> Distance:
    """LPIPS (arXiv 1801.03924) on AlexNet; its own weights come with the library `lpips`, AlexNet's are the file.

    Raises:
        WeightsError: lpips is not installed, or another network's file.
    """
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise WeightsError(
            "the library lpips has half of the network; `pip install lpips`"
        ) from error

    model = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    tensors = {name: x for name, x in read_tensors(file).items() if name.startswith("features.")}
    slices: dict[str, Tensor] = {}
    for (
        name,
        _,
    ) in model.net.named_parameters():  # slices of AlexNet's features, which keep their numbers
        slices[name] = tensors.get(f"features.{name.split('.', 1)[1]}", torch.empty(0))
    try:
        model.net.load_state_dict(slices)
    except RuntimeError as error:
        raise WeightsError(f"{file} is not torchvision's AlexNet: {error}") from error
    model = model.eval().to(device)

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> Tensor:
        pairs = zip(a.split(8), b.split(8), strict=True)
        return torch.cat(
            [model(x.to(device), y.to(device), normalize=True).flatten().cpu() for x, y in pairs]
        )

    return distance


def inception_judge(file: Path, device: torch.device) -> EmbedImages:
    """The Inception of the first FID (arXiv 1706.08500), its pool of 2048, through torchmetrics and torch-fidelity.

    Raises:
        WeightsError: torch-fidelity is not installed.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        model = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file)).to(device)
    except ModuleNotFoundError as error:
        raise WeightsError(
            "torch-fidelity has the network; `pip install torch-fidelity`"
        ) from error

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        parts = ((part * 255).round().clamp(0, 255).byte().to(device) for part in images.split(8))
        return torch.cat([model(part).cpu() for part in parts])

    return features


def each(
    network: Callable[[Tensor], Tensor],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> EmbedImages:
    """A network as a judge asks it: (B, 3, H, W) in [0, 1], eight at a time, fitted to size x size and normalised -> (B, D)."""

    @torch.no_grad()
    def embed(images: Tensor) -> Tensor:
        seen = []
        for part in images.split(8):
            fitted = (
                interpolate(part.float(), (size, size), mode="bicubic", antialias=True)
                .clamp(0, 1)
                .to(device)
            )
            shift, scale = (fitted.new_tensor(values)[:, None, None] for values in (mean, std))
            seen.append(network((fitted - shift) / scale).float().cpu())
        return torch.cat(seen)

    return embed
