"""`CostModel`: how long prefill and decode jobs take. Measured where there is a table, else predicted.

Table (JSON): model → tensor parallel → SM % → batch → length → `{"prefill": ms, "decoding": ms}`, -1 where
nothing was measured. `length` is the prompt's for prefill, and the tokens known so far for decode. There may
be `"together"` as well, of decode steps beside those of another model.

Beside models the table may have `"$service"`, what else was measured of a deployment: see `Service`.

Between measured points times are interpolated linearly in each of batch, length and share. A gap is filled
from its neighbours, and so is a cell whose time is far above that of a larger batch or length: more work
never takes less time, so it was disturbed when it was measured. Past the largest batch or length times go on
along the last slope, below the least share in proportion to it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from muxserve.placement.solver.shapes import Shape

DISTURBED = 1.25
"""A cell that took this many times as long as a larger one is not believed."""
KINDS = {"prefill": "prefill", "decode": "decoding", "together": "together"}
"""Kind of job to the table's name for it. Decode jobs of two models run "together": a table need not have
that."""


SERVICE = "$service"
"""Key of `Service` in a table: no model can have that name."""


class CostError(ValueError):
    """A cost table that cannot be read; the message says where."""


@dataclass(frozen=True, slots=True)
class Service:
    """What a deployment adds to the times of its jobs."""

    request_seconds: float = 0.0
    """On a request's way beside its jobs: to the device, and of its first token back."""
    compute_units: int = 0
    """What shares are made of, such as cores: two jobs side by side have at least one each. 0: any share can
    be had."""
    slots: int = 0
    """Sequences of a model that a unit runs at once. 0: not known."""
    decode_lanes: int = 1
    """Decode jobs of different models that run side by side."""
    order_seconds: float = 0.0
    """From the end of a job to the beginning of one that is decided on only then."""
    lease_seconds: float = 0.0
    """Of a decode job, beside its steps."""


class CostModel(Protocol):
    """Seconds of jobs. `share`: of the device's SMs, in (0, 1]."""

    def degrees(self, model: str, shape: Shape) -> Sequence[int]:
        """Tensor-parallel degrees that times are known for, ascending."""

    def shares(self, model: str, degree: int) -> Sequence[float]:
        """Shares that are worth telling apart, ascending; the last is 1."""

    def prefill(self, model: str, degree: int, share: float, batch: float, length: float) -> float:
        """Seconds to compute `batch` prompts of `length` tokens."""

    def decode(self, model: str, degree: int, share: float, batch: float, context: float) -> float:
        """Seconds of a step of `batch` sequences that know `context` tokens each."""

    def together(self, model: str, degree: int, share: float, batch: float, context: float) -> float:
        """The same beside decode jobs of other models, and no prefill job."""


class Surface:
    """One kind of job of one model at one degree: seconds over share, batch and length, without gaps."""

    def __init__(self, cells: Mapping[tuple[float, int, int], float], prefill: bool) -> None:
        """`cells`: (share, batch, length) to seconds, of those that were measured; at least one of each share
        that occurs. `prefill`: whether time grows with length where nothing else is known."""
        self.shares = sorted({share for share, _, _ in cells})
        self.batches = sorted({batch for _, batch, _ in cells})
        self.lengths = sorted({length for _, _, length in cells})
        self._grids = [
            _filled(
                {(b, n): t for (s, b, n), t in cells.items() if s == share},
                self.batches,
                self.lengths,
                prefill,
            )
            for share in self.shares
        ]
        """By share: seconds [batch][length]."""

    def at(self, share: float, batch: float, length: float) -> float:
        """Seconds."""
        shares = self.shares
        if share >= shares[-1]:
            return self._plane(-1, batch, length)
        if share <= shares[0]:
            return self._plane(0, batch, length) * shares[0] / share
        i = bisect_right(shares, share) - 1
        low = self._plane(i, batch, length)
        if share == shares[i]:
            return low
        weight = (share - shares[i]) / (shares[i + 1] - shares[i])
        return low + weight * (self._plane(i + 1, batch, length) - low)

    def _plane(self, index: int, batch: float, length: float) -> float:
        grid = self._grids[index]
        i, x = _place(self.batches, batch)
        j, y = _place(self.lengths, length)
        row = grid[i]
        k = j + 1 if j + 1 < len(row) else j
        low = row[j] + y * (row[k] - row[j])
        if x == 0.0:
            return low
        over = grid[i + 1]
        return low + x * (over[j] + y * (over[k] - over[j]) - low)


class TableCosts:
    """A measured table."""

    def __init__(
        self, surfaces: Mapping[tuple[str, int, str], Surface], service: Service | None = None
    ) -> None:
        """`surfaces`: by (model, degree, kind)."""
        self._surfaces = surfaces
        self.service = service or Service()

    @property
    def models(self) -> list[str]:
        """Those that were measured."""
        return sorted({model for model, _, _ in self._surfaces})

    def degrees(self, model: str, shape: Shape) -> Sequence[int]:
        """See `CostModel`."""
        return sorted({degree for name, degree, _ in self._surfaces if name == model})

    def shares(self, model: str, degree: int) -> Sequence[float]:
        """See `CostModel`."""
        return self._surfaces[model, degree, "decode"].shares

    def prefill(self, model: str, degree: int, share: float, batch: float, length: float) -> float:
        """See `CostModel`. What counts is the number of tokens: prompts shorter than any that was measured
        are taken for fewer of those."""
        surface = self._surfaces[model, degree, "prefill"]
        if length < surface.lengths[0]:
            batch, length = batch * length / surface.lengths[0], surface.lengths[0]
        return surface.at(share, batch, length)

    def decode(self, model: str, degree: int, share: float, batch: float, context: float) -> float:
        """See `CostModel`."""
        return self._surfaces[model, degree, "decode"].at(share, batch, context)

    def together(self, model: str, degree: int, share: float, batch: float, context: float) -> float:
        """See `CostModel`. Where that was not measured, as beside a prefill job."""
        measured = self._surfaces.get((model, degree, "together"))
        return (measured or self._surfaces[model, degree, "decode"]).at(share, batch, context)


def read_costs(path: Path) -> TableCosts:
    """Read a table. CostError: what is wrong with it."""
    try:
        document = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise CostError(f"{path}: {error}") from error
    except json.JSONDecodeError as error:
        raise CostError(f"{path}: not JSON: {error}") from error
    return parse_costs(document)


def parse_costs(document: Any) -> TableCosts:
    """A table from what its JSON holds. CostError: what is wrong with it."""
    surfaces = {}
    service = _service(document)
    for (model, degree), table in _by_degree(document):
        for kind, label in KINDS.items():
            cells = {
                (share, batch, length): float(ms) / 1e3
                for share, batch, length, cell in _cells(table, f"{model}.{degree}")
                if (ms := _milliseconds(cell, label, f"{model}.{degree}")) >= 0
            }
            if cells:
                surfaces[model, degree, kind] = Surface(cells, kind == "prefill")
        if not all((model, degree, kind) in surfaces for kind in ("prefill", "decode")):
            raise CostError(f"{model}.{degree}: nothing was measured")
    if not surfaces:
        raise CostError("the table is empty")
    return TableCosts(surfaces, service)


def _service(document: Any) -> Service:
    if not isinstance(document, dict) or SERVICE not in document:
        return Service()
    known = {
        "request_seconds": float,
        "compute_units": int,
        "slots": int,
        "decode_lanes": int,
        "order_seconds": float,
        "lease_seconds": float,
    }
    found: dict[str, Any] = {}
    for key, value in _items(document[SERVICE], SERVICE):
        if key not in known:
            raise CostError(f"{SERVICE}: unknown field {key!r}; known are {', '.join(known)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise CostError(f"{SERVICE}.{key}: must be a number of at least 0, not {value!r}")
        found[key] = known[key](value)
    return Service(**found)


def _by_degree(document: Any) -> list[tuple[tuple[str, int], Any]]:
    return [
        ((model, _whole(degree, f"{model}.{degree}")), table)
        for model, degrees in _items(document, "table")
        if model != SERVICE
        for degree, table in _items(degrees, model)
    ]


def _cells(table: Any, where: str) -> list[tuple[float, int, int, Any]]:
    return [
        (
            _whole(share, f"{where}.{share}") / 100,
            _whole(batch, f"{where}.{share}.{batch}"),
            _whole(length, f"{where}.{share}.{batch}.{length}"),
            cell,
        )
        for share, batches in _items(table, where)
        for batch, lengths in _items(batches, f"{where}.{share}")
        for length, cell in _items(lengths, f"{where}.{share}.{batch}")
    ]


def _milliseconds(cell: Any, label: str, where: str) -> float:
    value = cell.get(label, -1) if isinstance(cell, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise CostError(f"{where}: a cell must be {{prefill: ms, decoding: ms}}, not {cell!r}")
    return float(value)


def _items(value: Any, where: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise CostError(f"{where}: must be an object")
    return list(value.items())


def _whole(text: str, where: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise CostError(f"{where}: {text!r} is not a whole number above 0")
    return int(text)


def _place(points: Sequence[int], value: float) -> tuple[int, float]:
    """Index and weight such that points[i] + weight · (points[i + 1] - points[i]) is `value`; a weight above
    1 goes on past the last, and what lies before the first is taken for it."""
    if value <= points[0] or len(points) == 1:
        return 0, 0.0
    i = min(bisect_right(points, value), len(points) - 1) - 1
    return i, (value - points[i]) / (points[i + 1] - points[i])


def _filled(
    cells: Mapping[tuple[int, int], float], batches: Sequence[int], lengths: Sequence[int], prefill: bool
) -> list[list[float]]:
    """Seconds [batch][length] with disturbed cells and gaps replaced."""
    known = {at: seconds for at, seconds in cells.items() if not _disturbed(at, seconds, cells)}
    for length in lengths:
        for batch in batches:
            if (batch, length) not in known:
                known[batch, length] = _guess(batch, length, known, prefill)
    return [[known[batch, length] for length in lengths] for batch in batches]


def _disturbed(at: tuple[int, int], seconds: float, cells: Mapping[tuple[int, int], float]) -> bool:
    larger = (t for (b, n), t in cells.items() if b >= at[0] and n >= at[1])
    return seconds > DISTURBED * min(larger)


def _guess(batch: int, length: int, known: Mapping[tuple[int, int], float], prefill: bool) -> float:
    """From measured cells of the same length, along the slope between the two that are nearest; from other
    lengths where there are none."""
    same = sorted((b, t) for (b, n), t in known.items() if n == length)
    after = next((pair for pair in pairwise(same) if pair[0][0] < batch < pair[1][0]), None)
    if after is None and len(same) >= 2:
        after = (same[-2], same[-1]) if batch > same[-1][0] else (same[0], same[1])
    if after is not None:
        (b0, t0), (b1, t1) = after
        guess = t0 + (t1 - t0) * (batch - b0) / (b1 - b0)
        return max(guess, t1) if batch > b1 else max(guess, min(t0, t1) * batch / b1)
    other, seconds = min(
        (((b, n), t) for (b, n), t in known.items()),
        key=lambda item: (abs(item[0][1] - length), abs(item[0][0] - batch)),
    )
    return seconds * batch / other[0] * (length / other[1] if prefill else 1)
