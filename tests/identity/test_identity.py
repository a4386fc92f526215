"""Identity files: saved and loaded, private, and refused for other models."""

from __future__ import annotations

import os
import stat
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from openpulid.errors import IdentityError, OptionError
from openpulid.identity.identity import (
    Identity,
    concat_identities,
    fuse_identities,
)

MODELS = {"recognition": "aa", "vision": "bb"}


def someone(seed: int = 0, models: dict[str, str] = MODELS) -> Identity:
    generator = torch.Generator().manual_seed(seed)
    hidden = tuple(torch.randn(1, 17, 24, generator=generator) for _ in range(5))
    return Identity(torch.randn(1, 1, 138, generator=generator), hidden, models)


def test_saved_and_loaded(tmp_path) -> None:
    anna = concat_identities([someone(0), someone(1)])
    path = anna.save(tmp_path / "anna.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["anna.safetensors"]
    again = Identity.load(path, MODELS)
    assert again.photos == 2 and again.models == MODELS and again.created == anna.created
    assert torch.equal(again.id_cond, anna.id_cond)
    assert len(again.hidden) == 5 and all(map(torch.equal, again.hidden, anna.hidden))
    path.chmod(0o644)  # an older file that others could read is replaced by one that they cannot
    anna.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_full_size_identity_loads_fast(tmp_path) -> None:
    whole = Identity(
        torch.ones(1, 1, 1280), tuple(torch.ones(1, 577, 1024) for _ in range(5)), MODELS
    )
    path = whole.save(tmp_path / "anna.safetensors")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        Identity.load(path, MODELS)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_file_stores_the_number_of_images(tmp_path) -> None:
    three = [someone(seed) for seed in range(3)]
    for fusion, read in (("mean", 1), ("norm_id", 1), ("concat", 3)):
        path = fuse_identities(three, fusion).save(tmp_path / "anna.safetensors")
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["photos"] == "3"
        again = Identity.load(path)
        assert (again.num_sources, again.photos) == (3, read)
    mean = fuse_identities(three, "mean")
    assert repr(mean) == "Identity(3 images, models: recognition, vision)"
    assert (
        mean.zeros_like().num_sources == 3
        and fuse_identities([mean, three[0]], "mean").num_sources == 4
    )
    assert (
        concat_identities([mean, three[0]]).num_sources == 4
        and concat_identities([mean, three[0]]).photos == 2
    )


def test_unsuitable_files_are_refused(tmp_path) -> None:
    path = someone().save(tmp_path / "anna.safetensors")
    with pytest.raises(IdentityError, match=r"other models \(vision\)"):
        Identity.load(path, {**MODELS, "vision": "cc"})
    with pytest.raises(IdentityError, match="does not exist"):
        Identity.load(tmp_path / "nobody.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:50])
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name in ("cut", "other"):
        with pytest.raises(IdentityError, match="not an identity file"):
            Identity.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(IdentityError, match="cannot be written"):
        someone().save(tmp_path / "nowhere" / "anna.safetensors")
    with pytest.raises(IdentityError, match="one person"):
        Identity(torch.zeros(2, 1, 3), ())
    with pytest.raises(IdentityError, match="other models"):
        concat_identities([someone(), someone(1, {"vision": "cc"})])


def test_repr_contains_no_features() -> None:
    anna = someone()
    assert repr(anna) == "Identity(1 image, models: recognition, vision)"


def test_unconditional_identity_has_the_same_shapes() -> None:
    anna = someone()
    nobody = anna.zeros_like()
    assert nobody.id_cond.shape == anna.id_cond.shape and not nobody.id_cond.any()
    assert all(
        x.shape == y.shape and not x.any() for x, y in zip(nobody.hidden, anna.hidden, strict=True)
    )
    assert anna.to("cpu", torch.float16).hidden[0].dtype == torch.float16


def test_fusions() -> None:
    one, two, three = (someone(seed) for seed in range(3))
    assert fuse_identities([one, two, three]).photos == 3
    mean = fuse_identities([one, two], "mean")
    torch.testing.assert_close(mean.id_cond, (one.id_cond + two.id_cond) / 2)
    torch.testing.assert_close(mean.hidden[4], (one.hidden[4] + two.hidden[4]) / 2)
    assert mean.photos == 1 and mean.models == MODELS
    weighed = fuse_identities([one, two], "mean", [3, 1])
    torch.testing.assert_close(weighed.id_cond, 0.75 * one.id_cond + 0.25 * two.id_cond)


def photo(seed: int, length: float) -> Identity:
    """Build an identity whose raw face embedding has a given norm."""
    face, seen = (x / x.norm() for x in someone(seed).id_cond.split((100, 38), dim=-1))
    return Identity(torch.cat([length * face, seen], -1), someone(seed).hidden, MODELS)


def test_clear_images_weigh_more() -> None:
    sharp, dull = photo(0, 10), photo(1, 2)
    assert fuse_identities([dull, sharp], "max_norm") is sharp
    assert fuse_identities([dull, sharp], "max_norm", [6, 1]) is dull
    mostly = fuse_identities([sharp, dull], "norm_id")
    torch.testing.assert_close(mostly.id_cond, (10 * sharp.id_cond + 2 * dull.id_cond) / 12)
    torch.testing.assert_close(mostly.hidden[4], (10 * sharp.hidden[4] + 2 * dull.hidden[4]) / 12)
    weighed = fuse_identities([sharp, dull], "norm_id", [1, 5])
    torch.testing.assert_close(weighed.id_cond, fuse_identities([sharp, dull], "mean").id_cond)
    one_look = fuse_identities(
        [photo(0, 10), photo(0, 2)], "norm_id"
    )  # what both saw alike is as it was
    assert float(one_look.id_cond[..., 100:].norm()) == pytest.approx(1)


def test_embeddings_of_length_one_have_no_clearest_image() -> None:
    images = [photo(seed, 0) for seed in range(3)]
    for fusion in ("max_norm", "norm_id"):
        with pytest.raises(OptionError, match=f"{fusion} needs the norms .* use mean or concat"):
            fuse_identities(images, fusion)


def test_incompatible_identities_are_not_fused() -> None:
    one, two = someone(0), someone(1)
    for fusion, weights in (
        ("sum", None),
        ("concat", [1, 1]),
        ("mean", [1]),
        ("mean", [-1, 2]),
        ("mean", [0, 0]),
    ):
        with pytest.raises(OptionError):
            fuse_identities([one, two], fusion, weights)
    with pytest.raises(OptionError, match="at least one"):
        fuse_identities([])
    with pytest.raises(IdentityError, match="different numbers of images"):
        fuse_identities([one, concat_identities([one, two])], "mean")
    with pytest.raises(IdentityError, match=r"other models \(vision\)"):
        fuse_identities([one, someone(1, {**MODELS, "vision": "cc"})], "mean")


def write_file(path, changes=None, **facts: str):
    """Write an identity file with any tensors and metadata."""
    tensors = {"id_cond": torch.ones(1, 1, 138)}
    tensors |= {f"hidden.{level}": torch.ones(1, 17, 24) for level in range(5)}
    tensors |= changes or {}
    metadata = {"format": "openpulid.identity/1", "created": "", "photos": "1", "models": "{}"}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, path, metadata | facts)
    return path


@pytest.mark.parametrize(
    "facts",
    [
        {"models": "no JSON"},
        {"models": "[" * 100_000},
        {"models": '{"vision": 3}'},
        {"models": "[]"},
        {"photos": "many"},
        {"photos": "0"},
        {"photos": "9" * 10_000},
        {"created": "x" * 10_000},
    ],
)
def test_damaged_metadata_is_one_sentence(tmp_path, facts: dict[str, str]) -> None:
    path = write_file(tmp_path / "a.safetensors", **facts)
    with pytest.raises(IdentityError, match=r"a\.safetensors is damaged \(its metadata") as error:
        Identity.load(path)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    "changes",
    [
        {"id_cond": torch.ones(1, 138)},
        {"id_cond": torch.ones(1, 0, 138)},
        {"id_cond": torch.ones(1, 3, 138)},
        {"id_cond": torch.ones(1, 1, 138, dtype=torch.int64)},
        {"id_cond": torch.ones(1, 1, 138, dtype=torch.complex64)},
        {"id_cond": torch.full((1, 1, 138), float("nan"))},
        {"hidden.3": torch.full((1, 17, 24), float("inf"))},
        {"hidden.3": torch.full((1, 17, 24), 1e38)},
        {"hidden.3": torch.full((1, 17, 24), -1e9, dtype=torch.float64)},
        {"hidden.3": torch.full((1, 17, 24), 1e5).to(torch.bfloat16)},
        {"hidden.3": torch.full((1, 17, 24), float("nan")).to(torch.float8_e4m3fn)},
        {"hidden.3": torch.ones(2, 17, 24)},
        {"hidden.1": None},
        {"hidden.first": torch.ones(1, 17, 24)},
        {"landmarks": torch.ones(1, 1, 5, 3)},
        {"landmarks": torch.full((1, 1, 5, 2), float("nan"))},
    ],
)
def test_damaged_features_are_one_sentence(tmp_path, changes) -> None:
    path = write_file(tmp_path / "a.safetensors", changes)
    with pytest.raises(IdentityError, match=r"a\.safetensors is damaged \(.*\); create it again"):
        Identity.load(path)


def test_features_of_python_are_checked_as_well() -> None:
    anna = someone()
    anna.check_values()
    anna.hidden[2][0, 3, 4] = float("nan")
    with pytest.raises(IdentityError, match="not finite"):
        anna.check_values()
    with pytest.raises(OptionError, match="weights must be"):
        fuse_identities([someone(), someone(1)], "mean", [1, float("nan")])


def test_loaded_identity_does_not_depend_on_its_file(tmp_path) -> None:
    path = someone(0).save(tmp_path / "anna.safetensors")
    anna = Identity.load(path)
    content = bytes(path.stat().st_size)
    with path.open("r+b") as file:  # in place, as `cp` does
        file.write(content)
    assert torch.equal(anna.id_cond, someone(0).id_cond)
    path.write_bytes(b"")
    assert torch.equal(anna.hidden[4], someone(0).hidden[4])


def test_fingerprint_depends_on_the_features_alone(tmp_path) -> None:
    anna = someone(0)
    later = Identity(anna.id_cond, anna.hidden, {"vision": "cc"}, created="2030-01-01")
    assert anna.fingerprint == later.fingerprint == someone(0).fingerprint
    path = later.save(tmp_path / "anna.safetensors")
    assert Identity.load(path).fingerprint == anna.fingerprint
    assert len({someone(seed).fingerprint for seed in range(4)}) == 4
    changed = anna.hidden[4].clone()
    changed[0, 16, 23] += 1
    other = Identity(anna.id_cond, (*anna.hidden[:4], changed), MODELS)
    assert other.fingerprint != anna.fingerprint


def test_paths_that_are_no_files_are_one_sentence(tmp_path) -> None:
    with pytest.raises(IdentityError, match="is not an identity file"):
        Identity.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IdentityError, match="is not an identity file"):
        Identity.load(tmp_path / "pipe")
