"""What cleaning costs on one core, and what the default quality rules drop, by source.

The texts are the documentation of the installed packages (the tiny recipe's sources), and shared papers and textbooks
where there are any. Writes results/cleaning.json.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.config import load_recipe
from orchestrator.corpus_config import QualityConfig, Source
from orchestrator.data import documents, language, quality, steps
from tests.conftest import ROOT, SHARED_DATA

RESULTS = Path(__file__).with_name("results")
ROUNDS, CHARACTERS = 3, 3_000_000
"""Times that each measure is taken, and the text of a source that it is taken on."""
OFF = dict.fromkeys(QualityConfig.model_fields)


def texts_by_source() -> dict[str, list[str]]:
    sources = list(load_recipe(ROOT / "jobs" / "recipes" / "tiny.yaml").corpus.sources)
    sources += [Source(name=file.stem, path=str(file)) for file in sorted((SHARED_DATA / "corpus").glob("*.jsonl"))]
    read = {s.name: [d for f in documents.list_source(s) for d in documents.read_documents(f)] for s in sources}
    return {name: [d.text for d in found if isinstance(d, documents.Document)] for name, found in read.items()}


def seconds(work: Callable[[str], Any], texts: list[str]) -> float:
    """CPU time over all texts, the least of ROUNDS."""
    taken = []
    for _ in range(ROUNDS):
        before = time.process_time()
        for text in texts:
            work(text)
        taken.append(time.process_time() - before)
    return min(taken)


def test_cleaning_keeps_up_with_reading() -> None:
    defaults = QualityConfig()
    language.language_of("The model loads at the first text, which has letters enough to be asked about it.")
    results: dict[str, dict[str, Any]] = {}
    for source, everything in texts_by_source().items():
        reasons = Counter(quality.drop_reason(steps.clean(text), defaults) for text in everything)
        sizes = itertools.accumulate(map(len, everything))
        texts = [text for text, size in zip(everything, sizes, strict=True) if size < CHARACTERS]
        clean = [steps.clean(text) for text in texts]
        megabytes = sum(map(len, clean)) / 1e6
        results[source] = {
            "documents": len(everything),
            "dropped": {reason: count for reason, count in reasons.items() if reason},
            "clean MB/s": round(megabytes / seconds(steps.clean, texts), 1),
            "rules MB/s": round(megabytes / seconds(lambda text: quality.drop_reason(text, defaults), clean), 1),
            "language ms": round(1e3 * seconds(language.language_of, clean) / len(texts), 2),
            "each rule alone, ns a character": {
                limit: round(1e3 / megabytes * seconds(lambda text, r=rule: quality.drop_reason(text, r), clean), 1)
                for limit, value in defaults
                if value and (rule := QualityConfig.model_validate({**OFF, limit: value}))
            },
        }
    for source, result in results.items():
        print(f"\n{source}")
        for name, value in result.items():
            print(f"  {name:12} {value}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "cleaning.json").write_text(json.dumps(results, indent=2))
    assert all(result["clean MB/s"] > 5 and result["rules MB/s"] > 5 for result in results.values())
