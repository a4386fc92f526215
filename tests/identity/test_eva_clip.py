"""EVA02-CLIP's vision encoder: sizes, hidden states, and the published weights."""

from __future__ import annotations

import pytest
import torch

from openpulid.errors import WeightsError
from openpulid.identity.eva_clip import VisionEncoder

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 24,
    "num_heads": 3,
    "num_classes": 10,
    "ref_grid": None,
}


@torch.no_grad()
def test_hidden_states_and_embedding() -> None:
    torch.manual_seed(0)
    tower = VisionEncoder(**SMALL, depth=6).eval()
    assert tower.levels == [1, 2, 3, 4, 5]
    pixels = tower.prepare(torch.rand(2, 3, 50, 40))
    assert pixels.shape == (2, 3, 32, 32)
    embedding, hidden = tower(pixels)
    assert [x.shape for x in hidden] == [(2, 1 + 16, 24)] * 5
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(2))
    theirs = tower.visual(pixels)
    torch.testing.assert_close(embedding, theirs / theirs.norm(dim=1, keepdim=True))
    seen = []
    tower.visual.blocks[2].register_forward_hook(lambda m, a, out: seen.append(out))
    tower(pixels)
    torch.testing.assert_close(hidden[2], seen[0])


@pytest.mark.parametrize(
    ("depth", "levels"), [(24, [4, 8, 12, 16, 20]), (10, [2, 4, 5, 7, 9]), (5, [1, 2, 3, 4, 5])]
)
def test_levels_by_depth(depth: int, levels: list[int]) -> None:
    with torch.device("meta"):
        assert VisionEncoder(**SMALL, depth=depth).levels == levels
        for wrong in ([1, 2, 3, 4, depth + 1], [1, 2, 3, 4], [2, 1, 3, 4, 5]):
            with pytest.raises(ValueError, match="levels"):
                VisionEncoder(**SMALL, depth=depth, levels=wrong)


def test_default_is_full_size() -> None:
    with torch.device("meta"):
        tower = VisionEncoder()
    assert sum(x.numel() for x in tower.parameters()) == pytest.approx(304e6, rel=0.01)


def test_preprocessing_matches_clip() -> None:
    tower = VisionEncoder(**SMALL, depth=6)
    gray = tower.prepare(torch.full((1, 3, 32, 32), 0.5))
    torch.testing.assert_close(
        gray[0, :, 0, 0], torch.tensor([0.0689, 0.1614, 0.3318]), atol=2e-3, rtol=0
    )


@torch.no_grad()
def test_published_weights_match_the_reference(golden, tmp_path) -> None:
    names = golden.manifest["eva02_clip_l_14_336_visual"]
    state = {
        name: golden.weight(name, shape) for name, shape in names.items() if "rope" not in name
    }
    torch.save(
        {"text.some.weight": torch.ones(2), **state}, tmp_path / "EVA02_CLIP_L_336_psz14_s6B.pt"
    )
    tower = VisionEncoder.from_published(tmp_path / "EVA02_CLIP_L_336_psz14_s6B.pt")
    image = golden.input("eva.image", 1, 3, 336, 336)
    heads = []  # the embedding before its normalization, without a second pass of 5 seconds
    tower.visual.head.register_forward_hook(lambda module, args, output: heads.append(output))
    embedding, hidden = tower(image)
    (raw,) = heads
    assert golden.error("eva.embedding", raw) < 1e-4
    torch.testing.assert_close(embedding, raw / raw.norm())
    for level, tokens in enumerate(hidden):
        assert golden.error(f"eva.hidden_{level}.every_48th_token", tokens[:, ::48]) < 1e-4


def test_weights_are_cast_on_loading() -> None:
    torch.manual_seed(0)
    original = VisionEncoder(**SMALL, depth=5)
    state = {f"visual.{name}": x.half() for name, x in original.visual.state_dict().items()}
    encoder = VisionEncoder(**SMALL, depth=5)
    encoder.load_published(state, dtype=torch.bfloat16)
    for name, x in encoder.visual.state_dict().items():
        assert torch.equal(x, state[f"visual.{name}"].to(torch.bfloat16)), name


def test_incomplete_state_is_refused(golden) -> None:
    tower = VisionEncoder(**SMALL, depth=5)
    with pytest.raises(WeightsError, match=r"Missing key.*cls_token"):
        tower.load_published(
            {"visual.pos_embed": torch.zeros(1, 17, 24), "visual.norm.weight": torch.zeros(24)}
        )
    with pytest.raises(WeightsError, match="does not exist"):
        VisionEncoder.from_published("nowhere.pt")
