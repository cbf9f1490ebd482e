"""Connected components of the graph of duplicates, in one process or in rounds over partitions.

The rounds are the alternating algorithm of Kiveris et al., "Connected Components in MapReduce and Beyond", 2014. Edges
are (smaller, larger); records are (center, neighbour), and a partition holds every record of each of its centers:

    edges of any partitions         forest, if there are many: shrinks them before the first shuffle
    -> records = symmetric(edges)   shuffle by center
    -> large_star(records)          its records have the larger node as the center: shuffle by center
    -> small_star(records)          again (larger, smaller): the edges of the next round, and at the end
                                    (document, representative), each document once
    until the sum over partitions of checksum(small_star's records) is that of the round before
"""

from __future__ import annotations

import numpy as np

from orchestrator.data.splitmix import mix


def symmetric(edges: np.ndarray) -> np.ndarray:
    """Each edge under both its nodes as center: uint64 [2 m, 2], which is what `large_star` needs."""
    return np.concatenate([edges, edges[:, ::-1]])


def large_star(records: np.ndarray) -> np.ndarray:
    """Link each center's larger neighbours to the smallest of the center and its neighbours.

    Args:
        records: uint64 [m, 2], (center, neighbour), every edge of the graph under both its nodes.

    Returns:
        uint64 [n, 2], (larger, smaller), unique.
    """
    records = unique(records)
    least = np.minimum(_first_neighbours(records), records[:, 0])
    larger = records[:, 1] > records[:, 0]
    return unique(np.stack([records[larger, 1], least[larger]], axis=1))


def small_star(records: np.ndarray) -> np.ndarray:
    """Link each center and its neighbours, which are smaller than it, to the smallest of them.

    Args:
        records: uint64 [m, 2], (center, neighbour), every edge under its larger node.

    Returns:
        uint64 [n, 2], (larger, smaller), unique.
    """
    records = unique(records)
    least = _first_neighbours(records)
    nodes = np.concatenate([records[:, 1], records[:, 0]])
    return unique(np.stack([nodes, np.concatenate([least, least])], axis=1))


def checksum(records: np.ndarray) -> int:
    """Equal for equal sets of records in any order; those of partitions add up, modulo 2^64."""
    return int(mix(mix(records[:, 0]) ^ records[:, 1]).sum(dtype=np.uint64))


def forest(edges: np.ndarray) -> np.ndarray:
    """A star from the smallest node of each component to its others, uint64 [nodes - components, 2], unique.

    It connects what the edges connect, and never has more of them.
    """
    nodes, representatives = components(edges)
    others = nodes != representatives
    return np.stack([representatives[others], nodes[others]], axis=1)


def components(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components of edges that fit one process: every node, ascending, and the smallest node of its component.

    Each pass links roots to smaller roots next to them and flattens the trees; any two passes at least halve the roots
    of a component.
    """
    nodes, ends = np.unique(edges, return_inverse=True)
    a, b = ends.reshape(-1, 2).T
    root = np.arange(len(nodes))
    while len(a):
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        while not np.array_equal(root, above := root[root]):
            root = above
        a, b = root[a], root[b]
        a, b = a[a != b], b[a != b]
    return nodes, nodes[root]


def unique(pairs: np.ndarray) -> np.ndarray:
    """The distinct rows of pairs [m, 2], sorted; those that join a node to itself are left out."""
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    new = np.ones(len(pairs), dtype=bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[new]


def _first_neighbours(records: np.ndarray) -> np.ndarray:
    """For each of the sorted records, the smallest neighbour of its center, uint64 [m]."""
    starts = np.ones(len(records), dtype=bool)
    starts[1:] = records[1:, 0] != records[:-1, 0]
    return np.asarray(records[starts, 1][np.cumsum(starts) - 1])
