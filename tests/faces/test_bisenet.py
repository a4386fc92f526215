"""facexlib's face parser."""

import copy

import pytest
import torch
from facexlib.parsing.bisenet import BiSeNet

from openpulid.faces.bisenet import MEAN, NOT_FACE, STD, FaceParser, MainHead


@torch.no_grad()
def test_parser_gives_the_labels_of_the_network() -> None:
    torch.manual_seed(0)
    network = BiSeNet(num_class=19).eval()
    parser = FaceParser(MainHead(copy.deepcopy(network)))
    crop = torch.rand(1, 3, 512, 512)
    normalized = (crop - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    labels = network(normalized)[0].argmax(1, keepdim=True)
    expected = (~torch.isin(labels, torch.tensor(NOT_FACE))).float()
    mask = parser(crop)
    assert mask.shape == (1, 1, 512, 512)
    assert 0.05 < expected.mean() < 0.95
    assert mask.mean() == pytest.approx(expected.mean().item(), abs=1e-4)
    assert (mask != expected).float().mean() < 1e-4  # sums in another order
