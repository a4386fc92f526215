"""The extractor of W+ Adapter: a face on white, and its latents."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from openpulid.faces.bisenet import FaceParser, align_photo
from openpulid.identity.photo_extractor import LatentExtractor
from openpulid.methods.w_plus.encoders import read_latents
from tests.support.clip_files import FACE, Faces
from tests.support.photo_networks import SmallParser


class SmallLatents(nn.Module):
    """18 latents of width 4; e4e itself has a gigabyte of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * 16, 18 * 4)

    def forward(self, faces: Tensor) -> Tensor:
        assert faces.shape[1:] == (3, 256, 256)
        return self.layer(adaptive_avg_pool2d(faces, 4).flatten(1)).unflatten(1, (18, 4))


@torch.no_grad()
def test_latents_are_of_the_face_on_white() -> None:
    torch.manual_seed(0)
    parser = FaceParser(SmallParser())
    encoder = SmallLatents()
    extractor = LatentExtractor(Faces(), parser, encoder, {"e4e": "a"})
    (crop,) = extractor.debug_crops(FACE)
    aligned = align_photo(FACE)
    face = parser(aligned)
    # where a neighborhood is of one kind, the pixels are white, or those of the photo
    blurred = interpolate(nn.AvgPool2d(9, 1, 4)(face), (256, 256), mode="bilinear")[0, 0]
    photo = interpolate(aligned, (256, 256), mode="bilinear")[0]
    is_background, is_face = blurred < 1e-6, blurred > 1 - 1e-6
    assert is_background.any() and is_face.any()
    torch.testing.assert_close(crop[:, is_background], torch.ones_like(crop[:, is_background]))
    torch.testing.assert_close(crop[:, is_face], photo[:, is_face])
    (identity,) = extractor.extract([FACE])
    torch.testing.assert_close(read_latents(identity, 4), encoder(2 * crop[None] - 1))
    assert identity.id_cond.shape == (1, 1, 18 * 4) and not identity.hidden
    assert identity.models == {"e4e": "a"}
