"""CorpusDir: every path name of a corpus. A path of a corpus is spelled here and nowhere else.

<corpus>/
  manifest.json              written last: what the corpus holds
  units.json                 which task reads which files
  tokenizer/  shards/        what training reads
  documents/  dropped/       texts that were read and kept at first; texts that were not, each with its reason
  facts/  index/             of each unit: its counts, marking it as read; the records that deduplication compares
  dedup/<state>/             duplicates found among a set of units
  packed/                    of each unit: its counts, marking it as packed
"""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator import storage


@dataclass(frozen=True)
class CorpusDir:
    """Holds no state: two processes with the same uri see the same corpus."""

    uri: str

    def path(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)

    @property
    def manifest(self) -> str:
        return self.path("manifest.json")

    @property
    def units(self) -> str:
        return self.path("units.json")

    @property
    def tokenizer(self) -> str:
        return self.path("tokenizer")

    @property
    def tokenizer_inputs(self) -> str:
        """What the tokenizer was made from; written when it is whole."""
        return self.path("tokenizer.inputs")

    @property
    def contamination(self) -> str:
        return self.path("contamination.npy")

    def documents(self, unit: int) -> str:
        return self.path("documents", f"unit-{unit:06d}.arrow")

    def dropped(self, unit: int) -> str:
        return self.path("dropped", f"unit-{unit:06d}.arrow")

    def duplicates(self, unit: int) -> str:
        """The documents of a unit that were dropped for what others hold, each with its reason and the other."""
        return self.path("dropped", f"unit-{unit:06d}.duplicates.arrow")

    def facts(self, unit: int) -> str:
        return self.path("facts", f"unit-{unit:06d}.json")

    def journal(self, unit: int) -> str:
        """The piece that a task is at, written where a worker was lost before."""
        return self.path("journal", f"unit-{unit:06d}.json")

    def poison(self, unit: int) -> str:
        """Pieces that end the worker that reads them."""
        return self.path("poison", f"unit-{unit:06d}.json")

    def index(self, kind: str, unit: int) -> str:
        """Records to compare: kind is exact, near or spans-KEY."""
        return self.path("index", kind, f"unit-{unit:06d}.bin")

    def sample(self, unit: int) -> str:
        return self.path("sample", f"unit-{unit:06d}.arrow")

    def dedup(self, state: str, kind: str, part: int) -> str:
        return self.path("dedup", state, kind, f"part-{part:04d}.bin")

    def dedup_parts(self, state: str, kind: str) -> str:
        """A number for each part; the kind is done when it is there."""
        return self.path("dedup", state, kind, "parts.json")

    def packed(self, unit: int) -> str:
        return self.path("packed", f"unit-{unit:06d}.json")

    @staticmethod
    def shard(split: str, part: str, key: str) -> str:
        """Relative to the corpus; the key of its content is part of the name, so that no shard is ever overwritten."""
        return f"shards/{split}-{part}-{key[:8]}.arrow"
