"""Token ids to text as they come.

The pieces joined are what decoding all ids at once without special tokens gives. A character whose bytes are
not all there yet is held back. A token costs the same however long the text is.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable

from muxserve.gateway.pieces import Decoding, Kind

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer(ABC):
    """The state of one text."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that became certain with this token; may be empty."""

    def push_all(self, token_ids: Iterable[int]) -> str:
        """The same for several tokens."""
        return "".join(map(self.push, token_ids))

    @abstractmethod
    def flush(self) -> str:
        """What was held back, at the end of the text. Nothing may be pushed afterwards."""


def detokenizer(decoding: Decoding) -> Detokenizer:
    """A detokenizer for a new text."""
    match decoding.kind:
        case Kind.BYTES:
            return _ByteDetokenizer(decoding)
        case Kind.FALLBACK:
            return _FallbackDetokenizer(decoding)
        case Kind.WINDOW:
            return _WindowDetokenizer(decoding)


class SilentDetokenizer(Detokenizer):
    """For a model without a tokenizer: tokens have no text."""

    def push(self, token_id: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class _ByteDetokenizer(Detokenizer):
    """Byte-level vocabularies."""

    def __init__(self, decoding: Decoding) -> None:
        self._bytes_of = decoding.bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._utf8.decode(self._bytes_of(token_id))

    def push_all(self, token_ids: Iterable[int]) -> str:
        return self._utf8.decode(b"".join(map(self._bytes_of, token_ids)))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _FallbackDetokenizer(Detokenizer):
    """SentencePiece vocabularies with byte fallback.

    A run of bytes is text if all of it is UTF-8, and else one U+FFFD per byte: while it may be, it is held.
    """

    def __init__(self, decoding: Decoding) -> None:
        self._part_of = decoding.part_of
        self._strip, self._strip_left = decoding.strip_left
        self._run = 0
        self._held = ""
        self._broken = False
        self._utf8 = codecs.getincrementaldecoder("utf-8")("strict")

    def push(self, token_id: int) -> str:
        part = self._part_of(token_id)
        if part is None:
            return ""
        if isinstance(part, int):
            return self._stripped(self._push_byte(part))
        return self._stripped(self._end_run() + part)

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _push_byte(self, byte: int) -> str:
        if self._broken:
            return REPLACEMENT
        self._run += 1
        try:
            self._held += self._utf8.decode(bytes([byte]))
        except UnicodeDecodeError:
            text = REPLACEMENT * self._run
            self._utf8.reset()
            self._run = 0
            self._broken = True
            return text
        return ""

    def _end_run(self) -> str:
        if not self._run and not self._broken:
            return ""
        try:
            self._utf8.decode(b"", final=True)
            text = "" if self._broken else self._held
        except UnicodeDecodeError:
            text = REPLACEMENT * self._run
        self._run = 0
        self._held = ""
        self._broken = False
        self._utf8.reset()
        return text

    def _stripped(self, text: str) -> str:
        """`text` without what is still to be taken off the start of the whole text."""
        while self._strip_left and text:
            if not text.startswith(self._strip):
                self._strip_left = 0
            else:
                text = text[len(self._strip) :]
                self._strip_left -= 1
        return text


class _WindowDetokenizer(Detokenizer):
    """Any other decoder: a token's text is what it adds to the text of the few tokens before it."""

    _CONTEXT = 6

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._window: list[int] = []
        self._shown = 0
        self._shown_text = ""

    def push(self, token_id: int) -> str:
        if not self._decoding.shows(token_id):
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and len(self._window) - self._shown < self._CONTEXT:
            return ""
        return self._show(text)

    def flush(self) -> str:
        return self._show(self._decode(self._window)) if self._shown < len(self._window) else ""

    def _show(self, text: str) -> str:
        new = text[len(self._shown_text) :]
        self._window = self._window[-self._CONTEXT :]
        self._shown = len(self._window)
        self._shown_text = self._decode(self._window)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoding.backend.decode(token_ids, skip_special_tokens=True)
