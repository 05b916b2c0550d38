"""`Results`: everything that was measured, and the ratios that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.engine.lineup import OURS
from benchmarks.engine.plan import ATTENTION, ATTENTION_BASE, Cell
from benchmarks.engine.rounds import Measurement, best, chosen, rate
from benchmarks.engine.services import Through

COMPARED_CONTEXT = 128
"""Context at which decode is compared with peers batch by batch."""

COMPARED_PREFILL = Cell("prefill", 8, 512, 1)


@dataclass
class Results:
    """Filled while measuring. rates: tokens per second."""

    environment: dict[str, Any]
    ceilings: list[dict[str, Any]] = field(default_factory=list)
    """Measured before and after, for each number of threads; what counts is the best."""
    contenders: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: what each says about itself, its start and its memory."""
    families: dict[str, str] = field(default_factory=dict)
    """Which peer a contender is a variant of."""
    done: list[Measurement] = field(default_factory=list)
    through: Through | None = None

    @property
    def cells(self) -> list[Cell]:
        """All that were measured, in order."""
        return list(dict.fromkeys(one.cell for one in self.done))

    @property
    def model(self) -> dict[str, Any]:
        """Bytes and operations per token."""
        found: dict[str, Any] = self.contenders[OURS]["model"]
        return found

    @property
    def copy_bytes_per_s(self) -> float:
        """Read and written by the fastest copy."""
        return float(max(one["copy_bytes_per_s"] for one in self.ceilings))

    @property
    def flop_per_s(self) -> float:
        """Of the fastest product."""
        return float(max(one["matmul_flop_per_s"] for one in self.ceilings))

    def variants(self, peer: str) -> list[str]:
        """Contenders that are that peer."""
        return [name for name, family in self.families.items() if family == peer]

    def ceiling(self, cell: Cell) -> float:
        """Tokens per second that the measured bandwidth and products allow in that cell, whichever is less.

        Every weight is read once a step, and every position's KV; a step's products run at the rate of the
        best one measured. A prompt's products are all that counts in prefill.
        """
        m = self.model
        attention = m["attention_flop_per_token_and_position"]
        if cell.kind == "prefill":
            each = cell.context * m["layers_flop_per_token"] + m["head_flop_per_token"]
            each += attention * cell.context * (cell.context + 1) // 2
            return float(self.flop_per_s * cell.context / each)
        length = cell.context + cell.new / 2
        size = m["layers_weight_bytes"] + m["head_weight_bytes"]
        size += cell.batch * length * m["kv_bytes_per_token"]
        work = cell.batch * (m["layers_flop_per_token"] + m["head_flop_per_token"] + attention * length)
        return float(cell.batch / max(size / self.copy_bytes_per_s, work / self.flop_per_s))

    def attention_bytes_per_s(self) -> float | None:
        """KV bytes that a decode step's attention reads per second at ATTENTION; None if not measured.

        By the engine's own account of its time where it gives one, in the fastest run, as ceilings are the
        fastest of many; else a step's time less that of the same step with next to no KV.
        """
        found = chosen(self.done, OURS, ATTENTION)
        if not found:
            return None
        steps = ATTENTION.new - 1
        positions = sum(ATTENTION.context + 1 + step for step in range(steps))
        size = ATTENTION.batch * positions * self.model["kv_bytes_per_token"]
        told = [one.parts["attention"] for one in found if "attention" in one.parts]
        if told:
            return float(size / min(told))
        base = rate(self.done, OURS, ATTENTION_BASE)
        whole = rate(self.done, OURS, ATTENTION)
        return float(size / (steps * ATTENTION.batch * (1 / whole - 1 / base)))

    def outside(self, cell: Cell) -> float | None:
        """Part of our decode steps that is neither matrix products nor attention, if the engine tells."""
        told = [one.parts for one in chosen(self.done, OURS, cell) if one.parts]
        if not told:
            return None
        busy = (parts["matrices"] + parts["attention"] for parts in told)
        return 1 - statistics.median(b / sum(parts.values()) for b, parts in zip(busy, told, strict=True))

    def ratios(self) -> dict[str, Any]:
        """Ours over theirs, of what was measured. 1 is equal, more is better for us."""
        found: dict[str, Any] = {}
        for peer in dict.fromkeys(self.families.values()):
            over = {
                cell: _round(rate(self.done, OURS, cell) / best(self.done, self.variants(peer), cell))
                for cell in self.cells
                if cell.peers and best(self.done, self.variants(peer), cell)
            }
            found[f"decode_vs_{peer}"] = {
                str(cell.batch): ratio
                for cell, ratio in over.items()
                if cell.kind == "decode" and cell.context == COMPARED_CONTEXT
            }
            if COMPARED_PREFILL in over:
                found[f"prefill_vs_{peer}"] = over[COMPARED_PREFILL]
        if self.through is not None:
            found["services_vs_engine"] = _round(self.through.ratio)
            found["ttft_over_prefill_ms"] = _round(1000 * self.through.ttft_over_prefill_s)
        attention = self.attention_bytes_per_s()
        if attention is not None:
            found["attention_vs_copy"] = _round(attention / self.copy_bytes_per_s)
        return found

    def as_json(self) -> dict[str, Any]:
        """Raw results, from which `from_json` makes the same object."""
        return {
            "environment": self.environment,
            "ceilings": self.ceilings,
            "contenders": self.contenders,
            "families": self.families,
            "measurements": [asdict(one) for one in self.done],
            "services": None if self.through is None else self.through.as_json(),
            "ratios": self.ratios(),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Results:
        """From what `as_json` made."""
        through = raw["services"]
        return cls(
            environment=raw["environment"],
            ceilings=raw["ceilings"],
            contenders=raw["contenders"],
            families=raw["families"],
            done=_measurements(raw["measurements"]),
            through=through
            and Through(
                ready_s=through["ready_s"],
                memory=through["memory"],
                done=_measurements(through["measurements"]),
                streams=tuple(Cell(**cell) for cell in through["streams"]),
                lone=Cell(**through["lone"]),
            ),
        )


def _measurements(raw: Iterable[dict[str, Any]]) -> list[Measurement]:
    return [Measurement(**{**one, "cell": Cell(**one["cell"])}) for one in raw]


def _round(value: float) -> float:
    return round(float(value), 3)
