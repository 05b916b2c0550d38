"""Typed access to a checkpoint's untyped configuration: a wrong value fails with the name of its field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from muxserve.engine.checkpoint.errors import CheckpointError

MAX_SIZE = 1 << 40
"""No size of a model is larger: a number above it is a corrupt file."""

MAX_LAYERS = 10_000
MAX_HEAD_DIM = 1 << 14


class Fields:
    """The keys of one JSON object or metadata section.

    prefix goes before a key in errors ("config.json:"). A key that is absent or null takes the default;
    without a default it is an error. All readers raise CheckpointError.
    """

    def __init__(self, values: Mapping[str, object], prefix: str) -> None:
        self._values = values
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> object:
        return self._values.get(key)

    def error(self, key: str, reason: str) -> CheckpointError:
        return CheckpointError(self._prefix + key, reason)

    def _read(self, key: str, default: object) -> object:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.error(key, "is missing")
        return default

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        value = self._read(key, default)
        # 8192.0 is an integer to the tools that write these files; true is not.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be an integer, got {value!r}")
        if not minimum <= value <= maximum:
            raise self.error(key, f"must be in [{minimum}, {maximum}], got {value!r}")
        return value

    def optional_integer(self, key: str, minimum: int = 1, maximum: int = MAX_SIZE) -> int | None:
        return None if self.get(key) is None else self.integer(key, minimum=minimum, maximum=maximum)

    def number(self, key: str, default: float | None = None, *, positive: bool = True) -> float:
        value = self._read(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, f"must be a number, got {value!r}")
        if positive and value <= 0:
            raise self.error(key, f"must be positive, got {value!r}")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return None if self.get(key) is None else self.number(key)

    def flag(self, key: str, default: bool) -> bool:
        value = self._read(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {value!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._read(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, got {value!r}")
        return value

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of `length` numbers."""
        value = self._read(key, None)
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
            raise self.error(key, f"must be a list of {length} numbers")
        if not all(isinstance(item, int | float) for item in value):
            raise self.error(key, "must hold numbers only")
        return tuple(float(item) for item in value)

    def texts(self, key: str, length: int) -> tuple[str, ...] | None:
        """A list of `length` strings, or None if the key is absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
            raise self.error(key, f"must be a list of {length} strings")
        return tuple(str(item) for item in value)

    def section(self, key: str) -> Fields | None:
        """The object under `key`, or None if it is absent or null."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be an object, got {value!r}")
        return Fields(value, f"{self._prefix}{key}.")

    def with_defaults(self, defaults: Mapping[str, object]) -> Fields:
        """The same fields, where keys that are absent (not null) take values of `defaults`."""
        return Fields({**defaults, **self._values}, self._prefix)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One token id or a list of them; nothing if the key is absent or null."""
        value = self.get(key)
        if value is None:
            return ()
        items = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or item < 0:
                raise self.error(key, f"must be a token id or a list of token ids, got {value!r}")
        return tuple(int(item) for item in items if isinstance(item, int))
