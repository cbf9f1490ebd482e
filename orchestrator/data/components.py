"""Connected components of the graph of duplicates."""

from __future__ import annotations

import numpy as np


def unique(edges: np.ndarray) -> np.ndarray:
    """The distinct rows of edges [m, 2], sorted; those that join a node to itself are left out."""
    edges = edges[edges[:, 0] != edges[:, 1]]
    edges = edges[np.lexsort((edges[:, 1], edges[:, 0]))]
    new = np.ones(len(edges), dtype=bool)
    new[1:] = (edges[1:] != edges[:-1]).any(axis=1)
    return edges[new]
