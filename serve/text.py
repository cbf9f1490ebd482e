"""From token ids to the text that a client sees: whole characters only, cut at stop strings. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

CONTEXT_TOKENS = 4
"""Tokens before the answer that are decoded with it, since some tokenizers drop the space of a first word."""


class Detokenizer:
    """Text of a growing sequence of tokens. A character made of several tokens comes out with its last one."""

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        """
        Args:
            context: tokens that come before the first one pushed; their text is not given out.
        """
        self._decode = decode
        self._ids = list(context)
        self._start = 0
        self._end = len(self._ids)

    def push(self, token_id: int) -> str:
        """The text that this token completes; empty in the middle of a character."""
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text

    def flush(self) -> str:
        """What was held back, with U+FFFD for the bytes that never became a character."""
        text = self._pending()
        self._start = self._end = len(self._ids)
        return text

    def _pending(self) -> str:
        known = self._decode(self._ids[self._start : self._end])
        return self._decode(self._ids[self._start :])[len(known) :]


class StopStrings:
    """Passes text on until a stop string, which may arrive in pieces and is not passed on itself."""

    def __init__(self, stops: Collection[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = self._possible_start()
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def flush(self) -> str:
        held, self._held = self._held, ""
        return "" if self.found else held

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that could become a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        lengths = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)


class Transcript:
    """One answer as it is written: tokens in, text out, and why it ended."""

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        prompt: Sequence[int],
        end_ids: Collection[int],
        stops: Collection[str] = (),
    ) -> None:
        self._detokenizer = Detokenizer(decode, prompt[-CONTEXT_TOKENS:])
        self._stops = StopStrings(stops)
        self._end_ids = end_ids
        self.tokens = 0
        self.finish_reason: str | None = None
        """None while it goes on, then "stop" (end token or stop string) or "length"."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Text to send. Tokens after the end are ignored."""
        text = ""
        for token_id in token_ids:
            if self.finish_reason:
                break
            self.tokens += 1
            if token_id in self._end_ids:
                return text + self._close("stop")
            text += self._stops.push(self._detokenizer.push(token_id))
            if self._stops.found:
                self.finish_reason = "stop"
        return text

    def finish(self) -> str:
        """The rest of the text, when no more tokens come."""
        return "" if self.finish_reason else self._close("length")

    def _close(self, reason: str) -> str:
        text = self._stops.push(self._detokenizer.flush())
        self.finish_reason = "stop" if self._stops.found else reason
        return text + self._stops.flush()
