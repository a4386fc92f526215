"""Groups of similar images: duplicates, and images of the same person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

CHUNK = 4096
"""Rows and columns of a block of the similarity matrix: 64 MB."""
MAX_COMPONENT = 4000
"""Images that are clustered at once: a matrix of 64 MB."""
THRESHOLD_STEP = 0.05
"""By how much the threshold is raised for a larger group."""


def find_pairs(vectors: Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Find all pairs of vectors whose dot product is at least a threshold.

    Args:
        vectors: (N, D) float32, normalized.
        threshold: least dot product.

    Returns:
        (P, 2) indices of the pairs, the smaller first, and (P,) their dot products.
    """
    pairs, values = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.float32)]
    for rows, columns, products in _blocks(vectors):
        index = (products >= threshold).nonzero()
        found = index.cpu().numpy() + np.array([rows, columns])
        is_ordered = found[:, 0] < found[:, 1]
        pairs.append(found[is_ordered])
        values.append(products[index.unbind(1)].cpu().numpy()[is_ordered])
    return np.concatenate(pairs), np.concatenate(values)


def _blocks(vectors: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield first row, first column and values of the blocks of the upper similarity matrix."""
    for row in range(0, len(vectors), CHUNK):
        for column in range(row, len(vectors), CHUNK):
            yield row, column, vectors[row : row + CHUNK] @ vectors[column : column + CHUNK].T


def hash_vectors(hashes: Sequence[int]) -> Tensor:
    """Convert 64-bit hashes to unit vectors.

    Returns:
        (N, 64) float32; the dot product of two is 1 - d / 32 if d bits differ.
    """
    data = np.array(hashes, np.uint64)[:, None].view(np.uint8)
    bits = np.unpackbits(data, axis=1).astype(np.float32)
    return torch.from_numpy((2 * bits - 1) / 8)


def connect(count: int, pairs: np.ndarray) -> np.ndarray:
    """Group items that are connected by pairs.

    Args:
        count: number of items.
        pairs: (P, 2) indices.

    Returns:
        (N,) number of the group of each item.
    """
    ones = np.ones(len(pairs), np.int8)
    graph = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def find_duplicates(
    hashes: Sequence[int],
    embeddings: Tensor,
    *,
    max_bits: int,
    same_image: float,
    same_person: float,
) -> np.ndarray:
    """Group images that are the same: resized, recompressed, or cropped in another way.

    Args:
        hashes: 64-bit perceptual hashes of N images.
        embeddings: (N, D) of their faces, normalized.
        max_bits: of two hashes that may differ, if the faces are of one person.
        same_image: similarity of two faces that are the same whatever the hashes.
        same_person: similarity of two faces of one person.

    Returns:
        (N,) number of the group of each image.
    """
    # half a bit more, for rounding
    by_hash, _ = find_pairs(hash_vectors(hashes), 1 - (max_bits + 0.5) / 32)
    first, second = embeddings[by_hash[:, 0]], embeddings[by_hash[:, 1]]
    is_person = ((first * second).sum(1) >= same_person).cpu().numpy()
    by_face, _ = find_pairs(embeddings, same_image)
    return connect(len(hashes), np.concatenate([by_hash[is_person], by_face]))


def find_people(embeddings: Tensor, threshold: float) -> np.ndarray:
    """Group images by the person they show: average-linkage clustering of the face embeddings.

    Two clusters are joined while the mean similarity of their faces is at least the threshold. A
    single pair of strangers that look alike does not join two people. Groups of more than
    `MAX_COMPONENT` connected images are clustered with a higher threshold.

    Args:
        embeddings: (N, D), normalized.
        threshold: least mean similarity, cosine.

    Returns:
        (N,) number of the person of each image.
    """
    pairs, values = find_pairs(embeddings, threshold)
    groups = connect(len(embeddings), pairs)
    people = np.zeros(len(embeddings), np.int64)
    count = 0
    for rows in _split_large(np.arange(len(embeddings)), groups, pairs, values, threshold):
        labels = _cluster(embeddings[rows], threshold)
        people[rows] = labels + count
        count += labels.max() + 1
    return people


def _split_large(
    rows: np.ndarray, groups: np.ndarray, pairs: np.ndarray, values: np.ndarray, threshold: float
) -> Iterator[np.ndarray]:
    """Yield the rows of each group; a large one is split by a higher threshold.

    Args:
        rows: (N,) indices of the images.
        groups: (N,) their groups.
        pairs: (P, 2) pairs of rows' positions.
        values: (P,) their similarities.
        threshold: at which the groups were connected.
    """
    order = np.argsort(groups, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        if len(part) <= MAX_COMPONENT or threshold >= 1:
            yield rows[part]
            continue
        position = np.full(len(rows), -1)
        position[part] = np.arange(len(part))
        inside = (position[pairs[:, 0]] >= 0) & (values >= threshold + THRESHOLD_STEP)
        inner = position[pairs[inside]]
        yield from _split_large(
            rows[part],
            connect(len(part), inner),
            inner,
            values[inside],
            threshold + THRESHOLD_STEP,
        )


def _cluster(embeddings: Tensor, threshold: float) -> np.ndarray:
    """Return the number of the cluster of each embedding, from 0."""
    count = len(embeddings)
    if count == 1:
        return np.zeros(1, np.int64)
    distances = (1 - embeddings.double() @ embeddings.double().T).clamp(min=0).cpu().numpy()
    upper = distances[np.triu_indices(count, 1)]
    return fcluster(linkage(upper, "average"), 1 - threshold, "distance").astype(np.int64) - 1
