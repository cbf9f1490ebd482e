"""Deduplication's numerical core: rolling hashes, near-duplicates, components, shared spans, contamination."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
from collections.abc import Callable

import datasketch
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data import components, contamination, minhash, ngrams, spans
from tests.conftest import SHARED_DATA

log = logging.getLogger(__name__)
WORDS = [f"{a}{b}{c}" for a in ("sol", "ga", "ne", "tri") for b in ("ar", "o", "ul") for c in ("is", "ta", "x", "men")]


def prose(rng: random.Random, words: int) -> list[str]:
    return [rng.choice(WORDS) + str(rng.randrange(30)) for _ in range(words)]


def jaccard(a: str, b: str, n: int = 5) -> float:
    """Of the sets of word n-grams, by Python's own sets."""
    sets = [{tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (a.split(), b.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def near_duplicate(rng: random.Random, words: list[str]) -> list[str]:
    """Some words replaced, dropped or inserted, and perhaps two halves swapped."""
    rate = rng.uniform(0.001, 0.05)
    edited = [w for word in words for w in _edit(rng, word, rate)]
    middle = len(edited) // 2
    return edited[middle:] + edited[:middle] if rng.random() < 0.3 else edited


def _edit(rng: random.Random, word: str, rate: float) -> list[str]:
    return rng.choice([[rng.choice(WORDS)], [], [word, rng.choice(WORDS)]]) if rng.random() < rate else [word]


# --- ngrams -----------------------------------------------------------------------------------------------------


def spelled(text: str) -> list[str]:
    data, starts, ends = ngrams.words(text)
    return [bytes(data[a:b]).decode() for a, b in zip(starts, ends, strict=True)]


def test_words_are_lower_cased_runs_of_letters_digits_and_marks() -> None:
    assert spelled("  The α-Helix (ÉTÉ), x² = 12.5—“q”! ") == ["the", "α", "helix", "été", "x²", "12", "5", "q"]


def test_each_ideograph_and_kana_is_a_word() -> None:
    assert spelled("地球科学，GeoGPT很好。ひら a") == ["地", "球", "科", "学", "geogpt", "很", "好", "ひ", "ら", "a"]


def test_text_without_words_has_none() -> None:
    assert [spelled(text) for text in ("", " \n ", "--- | ---", "\ud800")] == [[], [], [], []]


def test_layout_case_and_punctuation_do_not_change_ngram_hashes() -> None:
    a = ngrams.word_ngram_hashes("The Sun, a star,\n\nis *hot* and far away.", 3)
    assert np.array_equal(a, ngrams.word_ngram_hashes("the sun - a star; is hot and FAR AWAY", 3))


@pytest.mark.parametrize("length", [1, 200, 5000])
def test_equal_ngrams_and_no_others_hash_alike(length: int) -> None:
    rng = random.Random(length)
    words = [rng.choice(["alpha", "beta", "al", "pha", "α"]) for _ in range(length)]
    runs = [tuple(words[i : i + 3]) for i in range(length - 2)]
    hashes = ngrams.word_ngram_hashes(" ".join(words), 3)
    assert len(hashes) == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs)) == len(set(zip(hashes.tolist(), runs, strict=True)))


def test_a_window_hashes_the_same_wherever_it_stands_and_by_either_way() -> None:
    data = np.frombuffer(random.Random(1).randbytes(3 * ngrams._BLOCK + 7), np.uint8)
    rolling = ngrams.rolling_hashes(data, 50)
    starts = np.arange(len(rolling))
    assert np.array_equal(rolling, ngrams.window_hashes(data, starts, starts + 50))
    assert np.array_equal(rolling[12345:], ngrams.rolling_hashes(data[12345:], 50))
    assert np.array_equal(rolling[40000:40001], ngrams.rolling_hashes(data[40000:40050], 50))
    assert len(np.unique(rolling)) == len(rolling)


def test_rows_of_many_texts_are_those_of_each() -> None:
    texts = ["one two three four", "", "one two", "a\0b c d e f", "..."]
    hashes, offsets = ngrams.ngram_rows(texts, 3)
    rows = [hashes[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert rows[0] == ngrams.word_ngram_hashes(texts[0], 3).tolist()
    assert rows[2] == ngrams.word_ngram_hashes(texts[2], 2).tolist()
    assert rows[3] == ngrams.word_ngram_hashes("a b c d e f", 3).tolist()
    assert rows[1] == rows[4] == []


# --- minhash ----------------------------------------------------------------------------------------------------


def _pairs(count: int) -> list[tuple[str, str]]:
    rng = random.Random(7)
    originals = [prose(rng, rng.randrange(60, 600)) for _ in range(count)]
    return [(" ".join(words), " ".join(near_duplicate(rng, words))) for words in originals]


def test_estimates_of_similarity_are_as_good_as_those_of_plain_minhash() -> None:
    pairs = _pairs(150)
    true = np.array([jaccard(a, b) for a, b in pairs])
    a, b = (minhash.signatures([pair[side] for pair in pairs]) for side in (0, 1))
    full = (a == b).mean(axis=1)
    sketched = minhash.similarity(minhash.sketches(a), minhash.sketches(b))
    oracle = np.array([_datasketch(x).jaccard(_datasketch(y)) for x, y in pairs])
    error = np.sqrt(true * (1 - true) / 128)
    for estimate, widened in ((full, 1.0), (sketched, 1.1), (oracle, 1.0)):
        assert (np.abs(estimate - true) <= 4 * widened * error + 0.01).all()
    assert np.sqrt(np.mean((full - true) ** 2)) < 1.25 * np.sqrt(np.mean((oracle - true) ** 2))
    assert abs(np.mean(sketched - true)) < 3 * np.mean(error) / np.sqrt(len(pairs))


def _datasketch(text: str) -> datasketch.MinHash:
    oracle = datasketch.MinHash(num_perm=128)
    words = text.split()
    oracle.update_batch([" ".join(words[i : i + 5]).encode() for i in range(len(words) - 4)])
    return oracle


def test_unrelated_texts_have_no_similarity_on_average() -> None:
    rng = random.Random(3)
    sketches = minhash.sketches(minhash.signatures([" ".join(prose(rng, 300)) for _ in range(200)]))
    estimates = minhash.similarity(sketches[:100], sketches[100:])
    assert abs(estimates.mean()) < 0.01
    assert estimates.max() < 0.15


def test_signature_of_a_text_depends_on_no_neighbour() -> None:
    texts = [" ".join(prose(random.Random(i), 40 * i)) for i in range(20)]
    together = minhash.signatures(texts)
    assert np.array_equal(together, np.concatenate([minhash.signatures([text]) for text in texts]))
    assert minhash.signatures([]).shape == (0, 128)


def test_short_texts_match_their_like_only() -> None:
    a, b, c, blank, empty = minhash.signatures(["Only three words", "only three WORDS!", "three words only", " ", ""])
    assert np.array_equal(a, b)
    assert (a != c).mean() > 0.9
    assert np.array_equal(blank, empty)
    assert not np.array_equal(blank, a)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_bands_find_pairs_at_the_threshold_and_pass_over_strangers(threshold: float) -> None:
    bands, rows = minhash.bands_for(threshold)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands > 0.95
    assert 1 - (1 - (threshold / 5) ** rows) ** bands < 0.05


def test_band_keys_agree_where_all_rows_of_the_same_band_do() -> None:
    signatures = np.random.default_rng(0).integers(0, 2**32, (2, 128), dtype=np.uint32)
    signatures[1, :30] = signatures[0, :30]
    signatures[1, 36:48] = signatures[0, 24:36]  # the rows of other bands
    keys = minhash.band_keys(signatures, 21, 6)
    assert (keys[0] == keys[1]).tolist() == [True] * 5 + [False] * 16
    assert len(np.unique(keys[0])) == 21


def _linked(texts: list[str], documents: np.ndarray, threshold: float) -> set[tuple[int, int]]:
    signatures = minhash.signatures(texts)
    bands, rows = minhash.bands_for(threshold)
    keys, sketches = minhash.band_keys(signatures, bands, rows), minhash.sketches(signatures)
    edges = minhash.duplicate_edges(
        keys.ravel(), np.repeat(documents, bands), np.repeat(sketches, bands, axis=0), threshold
    )
    return {(int(a), int(b)) for a, b in edges}


def test_injected_near_duplicates_are_found_and_little_else() -> None:
    pairs = _pairs(300)
    texts = [text for pair in pairs for text in pair]
    order = random.Random(2).sample(range(len(texts)), len(texts))
    documents = (np.arange(len(texts), dtype=np.uint64) << np.uint64(32)) | np.uint64(5)
    edges = _linked([texts[i] for i in order], documents[order], 0.8)
    found = {(a >> 32, b >> 32) for a, b in edges}
    true = {(2 * i, 2 * i + 1): jaccard(*pair) for i, pair in enumerate(pairs)}
    alike = {pair for pair, similarity in true.items() if similarity >= 0.8}
    assert len(alike) > 100
    assert len(alike & found) >= 0.98 * len(alike)
    assert found <= {pair for pair, similarity in true.items() if similarity > 0.6}
    assert all(a < b for a, b in edges)


def test_every_copy_in_a_large_bucket_is_linked_to_its_first() -> None:
    sketch = minhash.sketches(minhash.signatures(["some text that stands in many places on the web"]))
    documents = np.random.default_rng(1).permutation(np.arange(10, 50_010, dtype=np.uint64))
    keys = np.zeros(len(documents), dtype=np.uint64)
    edges = minhash.duplicate_edges(keys, documents, np.repeat(sketch, len(documents), axis=0), 0.8)
    assert np.array_equal(edges, [(10, document) for document in range(11, 50_010)])


def test_groups_in_one_bucket_are_linked_to_representatives_of_their_own() -> None:
    texts = [" ".join(prose(random.Random(group), 80)) for group in range(3)]
    sketches = minhash.sketches(minhash.signatures([texts[i % 3] for i in range(12)]))
    edges = minhash.duplicate_edges(np.ones(12, np.uint64), np.arange(12, dtype=np.uint64), sketches, 0.8)
    assert edges.tolist() == [[i % 3, i] for i in sorted(range(3, 12), key=lambda i: (i % 3, i))]


def test_records_of_different_buckets_are_not_compared() -> None:
    sketches = np.zeros((4, 64), dtype=np.uint8)
    edges = minhash.duplicate_edges(np.array([1, 2, 1, 3], np.uint64), np.array([9, 8, 7, 6], np.uint64), sketches, 0.8)
    assert edges.tolist() == [[7, 9]]
    nothing = minhash.duplicate_edges(np.empty(0, np.uint64), np.empty(0, np.uint64), sketches[:0], 0.8)
    assert nothing.shape == (0, 2)


@pytest.mark.skipif(not (SHARED_DATA / "corpus").is_dir(), reason="needs the sample corpora next to the repository")
def test_near_duplicates_of_real_papers_are_found() -> None:
    lines = (SHARED_DATA / "corpus" / "plos-starter.jsonl").read_text().splitlines()[:40]
    originals = [json.loads(line)["text"][:3000] for line in lines]
    rng = random.Random(11)
    copies = [" ".join(w for word in text.split() for w in _edit(rng, word, 0.01)) for text in originals]
    found = _linked(originals + copies, np.arange(80, dtype=np.uint64), 0.8)
    alike = {(i, 40 + i) for i, pair in enumerate(zip(originals, copies, strict=True)) if jaccard(*pair) >= 0.8}
    assert len(alike) >= 35
    assert len(alike - found) <= 1


# --- components -------------------------------------------------------------------------------------------------


def _smallest_of_component(edges: list[tuple[int, int]]) -> dict[int, int]:
    """By depth-first search."""
    neighbours: dict[int, set[int]] = {}
    for a, b in edges:
        neighbours.setdefault(a, set()).add(b)
        neighbours.setdefault(b, set()).add(a)
    smallest: dict[int, int] = {}
    for node in sorted(neighbours):
        waiting = [node] if node not in smallest else []
        while waiting:
            if (current := waiting.pop()) not in smallest:
                smallest[current] = node
                waiting.extend(neighbours[current])
    return smallest


def _rounds(edges: np.ndarray, partitions: int) -> tuple[dict[int, int], int]:
    """(document -> representative, rounds) as a driver over several partitions finds them."""

    def by_center(step: Callable[[np.ndarray], np.ndarray], records: np.ndarray) -> list[np.ndarray]:
        where = components.mix(records[:, 0].copy()) % np.uint64(partitions)
        return [step(records[where == partition]) for partition in range(partitions)]

    before = None
    for number in itertools.count(1):
        records = np.concatenate(by_center(components.large_star, components.symmetric(edges)))
        parts = by_center(components.small_star, records)
        edges = np.concatenate(parts)
        now = sum(components.checksum(part) for part in parts) % 2**64
        if now == before:
            assert len(np.unique(edges[:, 0])) == len(edges)
            return dict(edges.tolist()), number
        before = now
    raise AssertionError


GRAPHS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40)).filter(lambda edge: edge[0] != edge[1]), max_size=60
)


def _as_edges(pairs: list[tuple[int, int]]) -> np.ndarray:
    """Documents of many units, so that the numbers do not fit 32 bits."""
    return np.sort(np.array(pairs, dtype=np.uint64).reshape(-1, 2) << np.uint64(32), axis=1)


@given(GRAPHS, st.integers(1, 5))
def test_rounds_over_partitions_find_the_components(pairs: list[tuple[int, int]], partitions: int) -> None:
    true = {node << 32: least << 32 for node, least in _smallest_of_component(pairs).items() if node != least}
    shrunk = [components.forest(part) for part in np.array_split(_as_edges(pairs), partitions)]
    assert _rounds(_as_edges(pairs), partitions)[0] == true
    assert _rounds(np.concatenate(shrunk), partitions)[0] == true


@given(GRAPHS)
def test_components_are_those_of_a_search(pairs: list[tuple[int, int]]) -> None:
    nodes, representatives = components.components(_as_edges(pairs))
    true = _smallest_of_component(pairs)
    assert nodes.tolist() == [node << 32 for node in sorted(true)]
    assert representatives.tolist() == [true[node] << 32 for node in sorted(true)]


@given(GRAPHS)
def test_a_forest_connects_the_same_nodes_with_the_fewest_edges(pairs: list[tuple[int, int]]) -> None:
    forest = components.forest(_as_edges(pairs))
    true = _smallest_of_component(pairs)
    assert len(forest) == len(true) - len(set(true.values()))
    assert {(int(a) >> 32, int(b) >> 32) for a, b in forest} == {(least, n) for n, least in true.items() if n != least}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_chain_takes_logarithmically_many_rounds(ordered: bool) -> None:
    nodes = 10_000
    ids = np.arange(nodes) if ordered else np.random.default_rng(4).permutation(nodes)
    edges = np.sort(np.stack([ids[:-1], ids[1:]], axis=1), axis=1).astype(np.uint64)
    found, rounds = _rounds(edges, 8)
    shrunk = np.concatenate([components.forest(part) for part in np.array_split(edges, 8)])
    log.info("a chain of %d: %d rounds, %d from the forests of 8 partitions", nodes, rounds, _rounds(shrunk, 8)[1])
    assert found == dict.fromkeys(range(1, nodes), 0)
    assert rounds <= 1.5 * math.log2(nodes)
    assert _rounds(shrunk, 8)[1] <= 6


# --- spans ------------------------------------------------------------------------------------------------------


def _spans(texts: list[bytes], candidates: int) -> list[list[tuple[int, int]]]:
    """Each text's spans that stand in earlier ones, as a driver with one partition finds them."""
    records = [spans.fingerprints(text) for text in texts]
    documents = np.repeat(np.arange(len(texts), dtype=np.uint64), [len(hashes) for hashes, _ in records])
    hashes, offsets = (np.concatenate([record[i] for record in records]) for i in (0, 1))
    pairs: dict[tuple[int, int], list[tuple[int, int]]] = {}
    shuffled = np.random.default_rng(0).permutation(len(hashes))
    rows = spans.first_matches(hashes[shuffled], documents[shuffled], offsets[shuffled], candidates)
    for document, offset, other, other_offset in zip(*(column.tolist() for column in rows), strict=True):
        pairs.setdefault((document, other), []).append((offset, other_offset))
    found: list[list[tuple[int, int]]] = [[] for _ in texts]
    for (document, other), matches in pairs.items():
        assert other < document
        found[document] += spans.common_spans(texts[document], matches, texts[other])
    return found


def _covered(found: list[tuple[int, int]]) -> set[int]:
    return {position for start, end in found for position in range(start, end)}


def _covered_by_search(text: bytes, earlier: list[bytes], skip_repeats: bool) -> set[int]:
    """Positions of every 100 bytes that stand in an earlier text, perhaps without those of one repeated byte."""
    covered: set[int] = set()
    for start in range(len(text) - 99):
        window = text[start : start + 100]
        if any(window in other for other in earlier) and not (skip_repeats and len(set(window)) == 1):
            covered.update(range(start, start + 100))
    return covered


@st.composite
def _texts_with_copies(draw: st.DrawFn) -> list[bytes]:
    """Up to five texts over two letters, joined from slices of a few blocks, some of them periodic."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    blocks = [bytes(rng.choices(b"ab", k=rng.randrange(20, 250))) for _ in range(4)]
    blocks += [b"a" * 130, b"ab" * 70, b"aab" * 60, b"b" * 60]
    pieces = st.tuples(st.sampled_from(blocks), st.integers(0, 60), st.integers(40, 250))
    texts = draw(st.lists(st.lists(pieces, min_size=1, max_size=5), min_size=2, max_size=5))
    return [b"".join(block[start:end] for block, start, end in text) for text in texts]


@given(_texts_with_copies())
def test_spans_are_exactly_those_of_a_search(texts: list[bytes]) -> None:
    for document, found in enumerate(_spans(texts, candidates=10_000)):
        covered = _covered(found)
        assert covered >= _covered_by_search(texts[document], texts[:document], skip_repeats=True)
        assert covered <= _covered_by_search(texts[document], texts[:document], skip_repeats=False)
        assert all(end - start >= 100 for start, end in found)


@given(_texts_with_copies())
def test_first_occurrences_alone_lead_to_no_wrong_span(texts: list[bytes]) -> None:
    for document, found in enumerate(_spans(texts, candidates=1)):
        for start, end in found:
            assert any(texts[document][start:end] in other for other in texts[:document])


def test_a_copy_of_exactly_100_bytes_is_found_anywhere() -> None:
    rng = random.Random(5)
    first = rng.randbytes(3000)
    for start in range(0, 2900, 97):
        around = rng.randbytes(40_000)
        at = rng.randrange(len(around))
        copied = around[:at] + first[start : start + 100] + around[at:]
        assert (at, at + 100) in [(max(a, at), min(b, at + 100)) for a, b in _spans([first, copied], 1)[1]]
        assert not _spans([first, around[:at] + first[start : start + 98] + around[at:]], 1)[1]


def test_fingerprints_are_the_rightmost_minima_of_all_windows() -> None:
    text = random.Random(8).randbytes(40_000) + b"0123456789" * 30 + random.Random(9).randbytes(500)
    hashes = ngrams.rolling_hashes(np.frombuffer(text, np.uint8), 50)
    windows = np.lib.stride_tricks.sliding_window_view(hashes, 51)
    expected = np.unique(np.arange(len(windows)) + 50 - windows[:, ::-1].argmin(axis=1))
    found, offsets = spans.fingerprints(text)
    assert np.array_equal(offsets, expected)
    assert np.array_equal(found, hashes[expected])
    assert 24 < 40_000 / (offsets < 40_000).sum() < 28


def test_runs_of_one_byte_are_no_fingerprints() -> None:
    hashes, offsets = spans.fingerprints(
        random.Random(1).randbytes(300) + b"-" * 5000 + random.Random(2).randbytes(300)
    )
    assert len(np.unique(hashes)) == len(hashes) < 60
    assert not ((offsets >= 300) & (offsets <= 5250)).any()
    assert [len(spans.fingerprints(text)[0]) for text in (b"", b"a" * 99, b"-" * 500)] == [0, 0, 0]


def test_what_a_document_repeats_itself_matches_nothing() -> None:
    passage, rng = random.Random(3).randbytes(400), random.Random(4)
    texts = [passage + rng.randbytes(200) + passage, rng.randbytes(50) + passage + rng.randbytes(50) + passage]
    first, second = _spans(texts, 1)
    assert first == []
    assert second == [(50, 450), (500, 900)]


PARAGRAPHS = [
    "The first paragraph, naïve and long. " * 3,
    "Zweiter Absatz über Flüsse. " * 4,
    "".join(chr(0x4E00 + 7 * i) for i in range(90)),
    "# End",
]


def test_a_copied_paragraph_goes_and_its_neighbours_stay_whole() -> None:
    text = "\n\n".join(PARAGRAPHS).encode()
    other = ("Something else, " + PARAGRAPHS[0][5:] + "\n\n" + PARAGRAPHS[1] + "\n\n" + PARAGRAPHS[2][:50]).encode()
    found = _spans([other, text], 1)[1]
    parts = spans.removed(text, found)
    assert [text[a:b].decode() for a, b in parts] == [PARAGRAPHS[1]]
    assert spans.cut(text, parts) == "\n\n".join([PARAGRAPHS[0], *PARAGRAPHS[2:]])


def test_small_gaps_between_spans_are_bridged() -> None:
    text = b"x" * 150 + b"1234" + b"y" * 150
    assert spans.removed(text, [(154, 304), (0, 150)]) == [(0, 304)]
    assert spans.removed(text, [(0, 149), (154, 304)]) == []
    assert spans.removed(text, [(0, 300), (20, 150), (300, 304)]) == [(0, 304)]


def test_lines_are_paragraphs_where_no_blank_line_is() -> None:
    text = b"one " * 30 + b"\n" + b"two " * 30 + b"\n" + b"three"
    assert spans.removed(text, [(60, 245)]) == [(121, 241)]
    assert spans.removed(text.replace(b"\n", b"\n\n", 1), [(60, 245)]) == []


@given(
    st.lists(st.text(alphabet="aé第\n \t", max_size=12), max_size=12).map("\n".join),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80)).map(sorted), max_size=4),
)
def test_only_whole_paragraphs_inside_the_spans_are_removed(text: str, found: list[list[int]]) -> None:
    data = text.encode()
    inside = [(min(a, len(data)), min(b, len(data))) for a, b in found]
    parts = spans.removed(data, inside)
    bridged = _covered(inside) | {i for i in range(len(data)) if _is_in_gap(i, inside)}
    assert _covered(parts) <= bridged
    for start, end in parts:
        assert start == 0 or data[start - 1 : start] == b"\n"
        assert end == len(data) or data[end : end + 1] == b"\n"
    assert "\n\n\n" not in spans.cut(data, parts)
    assert set(spans.cut(data, parts)) <= set(text)


def _is_in_gap(position: int, found: list[tuple[int, int]]) -> bool:
    return any(b <= position < c <= b + 4 for _, b in found for c, _ in found)


# --- contamination ----------------------------------------------------------------------------------------------


def test_hits_count_the_shared_runs_of_13_words_whatever_the_layout() -> None:
    item = [f"word{i}" for i in range(20)]
    index = contamination.index([" ".join(item), "another question of the same evaluation " * 3])
    for shared in range(21):
        document = f"Before. {', '.join(item[:shared]).upper()}\n\nand after, " + " ".join(prose(random.Random(1), 50))
        assert contamination.hits(document, index) == max(shared - 12, 0)
    assert contamination.hits(" ".join(item * 2), index) == 2 * 8


def test_hits_are_those_of_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "_BATCH", 7)
    rng = random.Random(6)
    items = [[rng.choice("abc") for _ in range(rng.randrange(40))] for _ in range(50)]
    document = [rng.choice("abc") for _ in range(3000)]
    runs = {tuple(item[i : i + 6]) for item in items for i in range(len(item) - 5)}
    index = contamination.index((" ".join(item) for item in items), n=6)
    assert len(index) == len(runs)
    assert np.array_equal(index, np.unique(index))
    expected = sum(tuple(document[i : i + 6]) in runs for i in range(len(document) - 5))
    assert 0 < expected < len(document) - 5
    assert contamination.hits(" ".join(document), index, n=6) == expected


def test_short_items_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=contamination.__name__):
        index = contamination.index(["What is the nearest star?", "The Sun", " ".join(WORDS[:14])])
    assert len(index) == 2
    assert "1 texts looked for; 2 of fewer than 13 words" in caplog.text
    assert contamination.hits("What is the nearest star? The Sun", index) == 0
    assert contamination.hits(" ".join(WORDS), contamination.index([])) == 0
