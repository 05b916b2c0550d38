"""What a tokenizer's decoder does, cut into what can be done token by token."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.pre_tokenizers import ByteLevel


class Kind(Enum):
    """How text comes out of tokens."""

    BYTES = "bytes"
    """Every token is bytes, and the text is all of them as UTF-8."""
    FALLBACK = "fallback"
    """Every token is text, or one byte; runs of bytes that are UTF-8 are text as well."""
    WINDOW = "window"
    """A token's text depends on its neighbours in some other way."""


def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Printable bytes stand for themselves, the others follow from U+0100 on in order (GPT-2's alphabet).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    if set(table) != set(ByteLevel.alphabet()):
        raise AssertionError("the byte-level alphabet is not GPT-2's")
    return table


_BYTES = _byte_of_character()
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(slots=True)
class Decoding:
    """A tokenizer's decoder. Fills its tables as tokens are seen; a token costs one look-up afterwards."""

    backend: Backend
    kind: Kind = field(init=False)
    strip_left: tuple[str, int] = field(init=False, default=("", 0))
    """FALLBACK: how many of which character are taken off the start of the whole text."""
    _special: frozenset[int] = field(init=False)
    _replace: list[tuple[str, str]] = field(init=False, default_factory=list)
    _bytes: dict[int, bytes] = field(init=False, default_factory=dict)
    _parts: dict[int, str | int | None] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        added = self.backend.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in added.items() if token.special)
        decoder = self.backend.decoder
        steps = _steps(json.loads(decoder.__getstate__())) if decoder is not None else []
        names = [step["type"] for step in steps]
        if names == ["ByteLevel"]:
            self.kind = Kind.BYTES
        elif self._is_sentencepiece(steps):
            self.kind = Kind.FALLBACK
        else:
            self.kind = Kind.WINDOW

    def shows(self, token_id: int) -> bool:
        """Whether the token is known and not special, so that it takes part in the text."""
        return token_id not in self._special and self.backend.id_to_token(token_id) is not None

    def bytes_of(self, token_id: int) -> bytes:
        """BYTES: what the token adds to the text's bytes."""
        known = self._bytes.get(token_id)
        if known is None:
            token = (self.backend.id_to_token(token_id) if self.shows(token_id) else None) or ""
            try:
                known = bytes([_BYTES[character] for character in token])
            except KeyError:
                known = token.encode()
            self._bytes[token_id] = known
        return known

    def part_of(self, token_id: int) -> str | int | None:
        """FALLBACK: the token's text, or the byte that it stands for. None: the token is not shown."""
        try:
            return self._parts[token_id]
        except KeyError:
            token = self.backend.id_to_token(token_id) if self.shows(token_id) else None
            part = self._parts[token_id] = None if token is None else self._part(token)
            return part

    def _part(self, token: str) -> str | int:
        for old, new in self._replace:
            token = token.replace(old, new)
        byte = _BYTE_TOKEN.fullmatch(token)
        return int(byte[1], 16) if byte else token

    def _is_sentencepiece(self, steps: list[dict[str, Any]]) -> bool:
        """Whether they are Replace..., ByteFallback, Fuse, and maybe Strip from the left; notes them."""
        rest = list(steps)
        while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
            step = rest.pop(0)
            self._replace.append((step["pattern"]["String"], step["content"]))
        if [step["type"] for step in rest[:2]] != ["ByteFallback", "Fuse"]:
            return False
        rest = rest[2:]
        if rest and rest[0]["type"] == "Strip" and rest[0]["stop"] == 0:
            step = rest.pop(0)
            self.strip_left = (step["content"], step["start"])
        return not rest


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """The decoder as a flat list of steps."""
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for inner in decoder["decoders"] for step in _steps(inner)]
