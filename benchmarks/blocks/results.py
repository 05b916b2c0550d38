"""`Results`: all that was measured and computed, as raw JSON holds it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import msgspec

from benchmarks.blocks.bandwidth import Measured
from benchmarks.blocks.layouts import CONTIGUOUS, SIZES
from benchmarks.blocks.memory import Tables, Waste


class Results(msgspec.Struct, kw_only=True):
    """copies, reads: bytes per second of each of several measurements, spread over the run."""

    environment: dict[str, Any]
    copies: list[float] = []
    reads: list[float] = []
    measured: list[Measured] = []
    waste: list[Waste] = []
    tables: list[Tables] = []

    @property
    def copy_bytes_per_s(self) -> float:
        """Read and written; the best."""
        return max(self.copies)

    def decode(self) -> list[Measured]:
        """Shapes in which each sequence had one new token."""
        return [one for one in self.measured if one.kind == "decode"]

    def ratios(
        self, name: str, base: str = CONTIGUOUS, where: Callable[[Measured], bool] = lambda _: True
    ) -> list[float]:
        """A layout's decode speed in relation to another's, one number for each shape."""
        return [one.ratio(name, base) for one in self.decode() if where(one)]

    def unused(self, name: str, workload: str) -> list[float]:
        """Part of held memory that is not used, one number for each model."""
        return [one.unused for one in self.waste if (one.layout, one.workload) == (name, workload)]

    def summary(self) -> dict[str, Any]:
        """The most telling numbers, by size."""
        return {
            name: {
                "decode_vs_contiguous": round(statistics.median(self.ratios(name)), 3),
                "least_decode_vs_contiguous": round(min(self.ratios(name)), 3),
                "most_unused_sharegpt": round(max(self.unused(name, "ShareGPT")), 3),
            }
            for name in SIZES
        }
