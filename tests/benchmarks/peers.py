"""What others do, run by the Python of .venv-peers: `peers.py WHAT INPUT OUTPUT TOKENIZER`.

INPUT holds JSON Lines with a string field `text`; two processes share its files. Prints wall and CPU seconds, without
start-up and imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
WORKERS = 2


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def bare(source: Path, out: Path, tokenizer: str) -> dict[str, float]:
    """encode_batch_fast alone, on texts in memory: reading, packing and writing are not there, let alone counted."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(WORKERS), context.Queue()
    files = sorted(source.glob("*.jsonl"))

    def encode(part: int) -> None:
        from tokenizers import Tokenizer

        loaded = Tokenizer.from_file(tokenizer)
        texts = [json.loads(line)["text"] for file in files[part::WORKERS] for line in file.open()]
        loaded.encode_batch_fast(texts[:50], add_special_tokens=False)
        barrier.wait()
        started, cpu = time.time(), time.process_time()
        for first in range(0, len(texts), 256):
            loaded.encode_batch_fast(texts[first : first + 256], add_special_tokens=False)
        results.put((started, time.time(), time.process_time() - cpu))

    processes = [context.Process(target=encode, args=(part,)) for part in range(WORKERS)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return {"wall": max(f[1] for f in found) - min(f[0] for f in found), "cpu": sum(f[2] for f in found)}


def timed(work: Callable[[], object]) -> dict[str, float]:
    started, cpu = time.time(), cpu_seconds()
    work()
    return {"wall": time.time() - started, "cpu": cpu_seconds() - cpu}


def datatrove_tokens(source: Path, out: Path, tokenizer: str) -> dict[str, float]:
    """JsonlReader and DocumentTokenizer, without its shuffle."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    pipeline = [
        JsonlReader(str(source)),
        DocumentTokenizer(str(out), tokenizer, eos_token="</s>", shuffle_documents=False, batch_size=256),
    ]
    executor = LocalPipelineExecutor(
        pipeline, tasks=WORKERS, workers=WORKERS, logging_dir=str(out / "logs"), start_method="fork"
    )
    return timed(executor.run)


def datasets_map(source: Path, out: Path, tokenizer: str) -> dict[str, float]:
    """datasets.map over a dataset that is loaded already, batched, into its own Arrow cache."""
    from datasets import load_dataset
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(tokenizer)
    files = [str(file) for file in sorted(source.glob("*.jsonl"))]
    dataset = load_dataset("json", data_files=files, split="train", cache_dir=str(out))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [e.ids for e in loaded.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    return timed(lambda: dataset.map(encode, batched=True, batch_size=256, num_proc=WORKERS, remove_columns=["text"]))


def datatrove_minhash(source: Path, out: Path, tokenizer: str) -> dict[str, float]:
    """Signatures, buckets, clusters, filter, as in its documentation. Leaves the kept documents in OUTPUT/kept."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig()
    paths = {name: str(out / name) for name in ("signatures", "buckets", "removed", "kept")}
    steps = [
        (WORKERS, [JsonlReader(str(source)), MinhashDedupSignature(paths["signatures"], config)]),
        (config.num_buckets, [MinhashDedupBuckets(paths["signatures"], paths["buckets"], config=config)]),
        (1, [MinhashDedupCluster(paths["buckets"], paths["removed"], config=config)]),
        (
            WORKERS,
            [
                JsonlReader(str(source)),
                MinhashDedupFilter(paths["removed"]),
                JsonlWriter(paths["kept"], compression=None),
            ],
        ),
    ]
    times = [
        timed(
            LocalPipelineExecutor(
                pipeline,
                tasks=tasks,
                workers=WORKERS,
                logging_dir=str(out / "logs" / str(number)),
                start_method="fork",
            ).run
        )
        for number, (tasks, pipeline) in enumerate(steps)
    ]
    return {key: sum(time_[key] for time_ in times) for key in ("wall", "cpu")}


if __name__ == "__main__":
    what, source, out, tokenizer = sys.argv[1:]
    print(json.dumps(globals()[what](Path(source), Path(out), tokenizer)))
