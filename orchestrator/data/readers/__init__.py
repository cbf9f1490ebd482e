"""Readers of one document each: the bytes of a file -> Markdown with Galactica's markup.

Every reader is a function `read(data: bytes) -> str` that raises Unreadable, whose message is the drop reason.
"""

from __future__ import annotations


class Unreadable(Exception):
    """A file or record yields no document; the message is the drop reason, a few words without names or numbers."""
