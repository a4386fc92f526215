"""Groups of similar images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from torch.nn.functional import normalize

from openpulid.data import similar
from openpulid.data.similar import connect, find_duplicates, find_pairs, find_people, hash_vectors


def embed_people(count: int, images: int, noise: float = 0.6, dim: int = 64) -> torch.Tensor:
    """Return embeddings of people, an image of each in turn."""
    generator = torch.Generator().manual_seed(0)
    people = normalize(torch.randn(count, dim, generator=generator), dim=1)
    faces = people.repeat(images, 1)
    offsets = normalize(torch.randn(len(faces), dim, generator=generator), dim=1)
    return normalize(faces + noise * offsets, dim=1)


def same_groups(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two groupings are equal but for the numbers of the groups."""
    return bool(((one[:, None] == one) == (other[:, None] == other)).all())


def test_pairs_are_those_of_the_whole_matrix(monkeypatch) -> None:
    monkeypatch.setattr(similar, "CHUNK", 7)
    vectors = embed_people(10, 3)
    pairs, values = find_pairs(vectors, 0.5)
    products = vectors @ vectors.T
    expected = (products.triu(1) >= 0.5).nonzero().numpy()
    assert len(expected) > 20
    assert {tuple(pair) for pair in pairs} == {tuple(pair) for pair in expected}
    assert np.allclose(values, products[pairs[:, 0], pairs[:, 1]], atol=1e-6)


def test_products_of_hashes_count_different_bits() -> None:
    vectors = hash_vectors([0, 0b1011, 2**64 - 1])
    assert (vectors @ vectors.T)[0].tolist() == pytest.approx([1, 1 - 3 / 32, -1])


def test_duplicates_need_the_same_person_or_the_same_face() -> None:
    faces = embed_people(4, 1)
    embeddings = torch.stack(
        [
            faces[0],
            normalize(faces[0] + 0.6 * faces[3], dim=0),  # the same hash, and the person
            faces[1],  # the same hash, but another person
            faces[2],
            normalize(faces[2] + 0.05 * faces[3], dim=0),  # another crop of the same image
        ]
    )
    hashes = [0b1111, 0b1100, 0b1111, 2**40 - 1, 2**63]
    groups = find_duplicates(
        hashes, embeddings, max_bits=2, same_image=0.95, same_person=0.4
    ).tolist()
    assert groups[0] == groups[1] and groups[3] == groups[4]
    assert len(set(groups)) == 3
    # three bits are too many
    hashes[1] = 0b1000
    groups = find_duplicates(
        hashes, embeddings, max_bits=2, same_image=0.95, same_person=0.4
    ).tolist()
    assert groups[0] != groups[1]


def test_people_are_found() -> None:
    embeddings = embed_people(12, 5)
    people = find_people(embeddings, 0.4)
    assert same_groups(people, np.tile(np.arange(12), 5))


def test_people_are_those_of_average_linkage() -> None:
    embeddings = embed_people(12, 5, noise=1.2)
    people = find_people(embeddings, 0.3)
    distances = (1 - embeddings @ embeddings.T).double().numpy()[np.triu_indices(60, 1)]
    expected = fcluster(linkage(distances, "average"), 0.7, "distance")
    assert same_groups(people, expected)
    groups = connect(60, find_pairs(embeddings, 0.3)[0])
    assert len(set(groups.tolist())) < len(set(people.tolist()))


def test_pair_of_similar_strangers_does_not_join_people() -> None:
    embeddings = embed_people(2, 4, noise=0.3)
    between = normalize(embeddings[0] + embeddings[1], dim=0)
    embeddings = torch.cat([embeddings, between[None]])
    people = find_people(embeddings, 0.6)
    assert len({*people[0:8:2].tolist(), *people[1:8:2].tolist()}) == 2
    groups = connect(9, find_pairs(embeddings, 0.6)[0])
    assert len(set(groups.tolist())) == 1


def test_large_group_is_split(monkeypatch) -> None:
    monkeypatch.setattr(similar, "MAX_COMPONENT", 6)
    embeddings = embed_people(4, 5, noise=0.3)
    bridge = normalize(embeddings[0] + embeddings[1], dim=0)
    people = find_people(torch.cat([embeddings, bridge[None]]), 0.5)
    assert same_groups(people[:20], np.tile(np.arange(4), 5))


def test_items_without_pairs_are_groups_of_their_own() -> None:
    assert len(set(connect(3, np.zeros((0, 2), np.int64)).tolist())) == 3
