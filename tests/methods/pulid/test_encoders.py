"""Both encoders: parity with the reference on seeded weights, several images, other sizes."""

from __future__ import annotations

import pytest
import torch

from openpulid.methods.pulid.encoders import IDEncoder, IDFormer

TINY = {"width": 12, "vit_dim": 8, "hidden_dim": 16}


def features(
    batch: int, photos: int = 1, patches: int = 9
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(batch, photos * (1 + patches), 8, generator=generator) for _ in range(5)]
    return torch.randn(batch, photos, 12, generator=generator), hidden


@torch.no_grad()
def test_idencoder_matches_reference(golden) -> None:
    encoder = golden.fill(IDEncoder(), "id_adapter.")
    tokens = encoder(
        golden.input("id_cond", 2, 1280), [golden.input(f"vit{i}", 2, 577, 1024) for i in range(5)]
    )
    assert golden.error("idencoder.tokens", tokens) < 1e-4


@torch.no_grad()
def test_idformer_matches_reference(golden) -> None:
    encoder = golden.fill(IDFormer(), "id_adapter.")
    hidden = [golden.input(f"vit{i}", 2, 577, 1024) for i in range(5)]
    id_cond = golden.input("id_cond", 2, 1280)
    assert golden.error("idformer.tokens", encoder(id_cond, hidden)) < 1e-4
    assert golden.error("idformer.tokens_uncond", encoder.unconditional(id_cond, hidden)) < 1e-4
    three = [golden.input(f"multi.vit{i}", 1, 1731, 1024) for i in range(5)]
    tokens = encoder(golden.input("multi.id_cond", 1, 3, 1280), three)
    assert golden.error("idformer.tokens_three_images", tokens) < 1e-4
    # the unconditional tokens are those of one image of zeros, for any number of images
    unconditional = encoder.unconditional(golden.input("multi.id_cond", 1, 3, 1280), three)
    assert golden.error("idformer.tokens_uncond", unconditional) < 1e-4


@pytest.mark.parametrize(
    ("encoder", "published"), [(IDEncoder, "pulid_v1"), (IDFormer, "pulid_v1.1")]
)
def test_published_names_and_shapes(golden, encoder, published: str) -> None:
    with torch.device("meta"):
        ours = {f"id_adapter.{name}": list(x.shape) for name, x in encoder().state_dict().items()}
    theirs = {k: v for k, v in golden.manifest[published].items() if k.startswith("id_adapter.")}
    assert ours == theirs


def test_idencoder_reads_further_images() -> None:
    encoder = IDEncoder(context_dim=32, **TINY)
    id_cond, hidden = features(2, photos=3)
    tokens, mixed = encoder(id_cond, hidden), encoder(id_cond, hidden, mix=True)
    assert tokens.shape == (2, 10 + 5 + 5, 32) and mixed.shape == (2, 30, 32)
    alone = [
        encoder(id_cond[:, i], [x[:, 10 * i : 10 * (i + 1)] for x in hidden]) for i in range(3)
    ]
    torch.testing.assert_close(tokens, torch.cat([alone[0], alone[1][:, :5], alone[2][:, :5]], 1))
    torch.testing.assert_close(mixed, torch.cat(alone, 1))
    assert encoder.unconditional(id_cond, hidden).shape == (1, 20, 32)


def test_idformer_sizes_are_configurable() -> None:
    encoder = IDFormer(
        dim=16,
        depth=5,
        dim_head=4,
        heads=2,
        num_id_token=3,
        num_queries=7,
        output_dim=24,
        ff_mult=2,
        **TINY,
    )
    assert encoder(*features(2)).shape == (2, 7, 24)
    assert encoder(*features(1, photos=4)).shape == (1, 7, 24)
    assert IDFormer(**encoder.config).state_dict().keys() == encoder.state_dict().keys()
    with pytest.raises(ValueError, match="multiple of 5"):
        IDFormer(depth=7)
