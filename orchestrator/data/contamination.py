"""Decontamination: runs of 13 words that a document shares with the items of an evaluation.

Word n-grams as in Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C, and Galactica's check.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from orchestrator.data.ngrams import word_ngram_hashes

log = logging.getLogger(__name__)
_BATCH = 1 << 14


def index(texts: Iterable[str], n: int = 13) -> np.ndarray:
    """The n-gram hashes of evaluation items, uint64, sorted and unique.

    Items of fewer than n words are left out, and their number logged: a short question or a lone answer stands in
    innocent documents as well.
    """
    known, batch = np.empty(0, dtype=np.uint64), []
    items = short = 0
    for text in texts:
        hashes = word_ngram_hashes(text, n)
        items, short = items + 1, short + (len(hashes) == 0)
        batch.append(hashes)
        if len(batch) == _BATCH:
            known, batch = np.union1d(known, np.concatenate(batch)), []
    known = np.unique(np.concatenate([known, *batch]))
    log.info("evaluation sets: %d texts looked for; %d of fewer than %d words are not", items - short, short, n)
    return known


def hits(text: str, index: np.ndarray, n: int = 13) -> int:
    """How many of a text's n-grams, repetitions included, stand in an index made for the same n."""
    hashes = word_ngram_hashes(text, n)
    if not len(index):
        return 0
    hashes.sort()  # searched in order, neighbours in the index share the cache
    return int(np.count_nonzero(index.take(np.searchsorted(index, hashes), mode="clip") == hashes))
