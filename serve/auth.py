"""Optional API keys, from TERRANE_API_KEYS (comma separated) or the file named by TERRANE_API_KEYS_FILE (one a line).

Only SHA-256 digests leave the process that reads them. With neither variable set the service is open.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import UserError

KEYS = "TERRANE_API_KEYS"
KEYS_FILE = "TERRANE_API_KEYS_FILE"


@dataclass(frozen=True, kw_only=True)
class Keys:
    """Digests of the accepted keys; none of them accepts everyone."""

    digests: tuple[bytes, ...] = ()

    def accept(self, authorization: str | None) -> bool:
        """Whether the Authorization header bears one of the keys, in a time that does not depend on which."""
        if not self.digests:
            return True
        scheme, _, key = (authorization or "").partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return any(matches) and scheme.lower() == "bearer"


def load_keys(environ: Mapping[str, str] = os.environ) -> Keys:
    """
    Raises:
        UserError: keys are configured and there is none, or their file cannot be read: never open by mistake.
    """
    return Keys(digests=tuple(_digest(key) for key in read_keys(environ)))


def read_keys(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The keys themselves, in their order; raises as `load_keys` does."""
    texts = []
    if KEYS in environ:
        texts.append((KEYS, environ[KEYS].replace(",", "\n")))
    if KEYS_FILE in environ:
        texts.append((f"{KEYS_FILE}={environ[KEYS_FILE]}", _read(environ[KEYS_FILE])))
    keys: list[str] = []
    for source, text in texts:
        found = [line.strip() for line in text.splitlines() if line.strip()]
        if not found:
            raise UserError(f"{source} holds no API key", "put one in, or unset the variable to serve without keys")
        keys += found
    return tuple(keys)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the API keys of {KEYS_FILE}={path}: {error}") from None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
