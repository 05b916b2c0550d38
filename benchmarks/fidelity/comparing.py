"""The service's figures beside the simulator's, model by model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muxserve.bench.outcomes import Outcome, Status

THROUGHPUT, LATENCY = 0.10, 0.25
"""How far the simulator may be off, as parts of what was measured."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one model, or all."""

    requests: int
    throughput: float
    """Requests that finished within the window, per second."""
    ttft: float
    tpot: float
    """Means in seconds, of requests that arrived within it."""


@dataclass(frozen=True, slots=True)
class Row:
    """One model at one load. Errors are parts of what was measured; above 0: simulated is more."""

    model: str
    service: Figures
    simulated: Figures
    throughput_error: float
    ttft_error: float
    tpot_error: float
    holds: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """One load."""

    load: float
    rate: float
    rows: tuple[Row, ...]
    all: Row

    def summary(self) -> str:
        """For people."""
        one = self.all
        return (
            f"throughput {one.throughput_error:+.1%}, ttft {one.ttft_error:+.1%} of "
            f"{one.service.ttft * 1e3:.0f} ms, tpot {one.tpot_error:+.1%} of "
            f"{one.service.tpot * 1e3:.1f} ms; {sum(row.holds for row in self.rows)} of {len(self.rows)} hold"
        )


def compare(
    load: float,
    rate: float,
    service: Sequence[Sequence[Outcome]],
    simulated: Sequence[Sequence[Outcome]],
    window: tuple[float, float],
) -> Comparison:
    """Of several runs, alike in number. `window`: seconds of each that count."""
    names = sorted({one.model for run in service for one in run})
    rows = [_row(name, _of(name, service), _of(name, simulated), window) for name in names]
    return Comparison(load, rate, tuple(rows), _row("all", service, simulated, window))


def _of(model: str, runs: Sequence[Sequence[Outcome]]) -> list[list[Outcome]]:
    return [[one for one in run if one.model == model] for run in runs]


def _row(
    name: str,
    service: Sequence[Sequence[Outcome]],
    simulated: Sequence[Sequence[Outcome]],
    window: tuple[float, float],
) -> Row:
    one, other = _figures(service, window), _figures(simulated, window)
    throughput = _error(one.throughput, other.throughput)
    ttft, tpot = _error(one.ttft, other.ttft), _error(one.tpot, other.tpot)
    holds = abs(throughput) <= THROUGHPUT and max(abs(ttft), abs(tpot)) <= LATENCY
    return Row(name, one, other, throughput, ttft, tpot, holds)


def _figures(runs: Sequence[Sequence[Outcome]], window: tuple[float, float]) -> Figures:
    begin, end = window
    done = [one for run in runs for one in run if one.status is Status.OK]
    arrived = [one for one in done if begin <= one.at < end]
    return Figures(
        requests=len(arrived),
        throughput=sum(begin <= one.end < end for one in done) / (end - begin) / len(runs),
        ttft=_mean([one.ttft for one in arrived]),
        tpot=_mean([one.tpot for one in arrived]),
    )


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def _error(measured: float, simulated: float) -> float:
    return round((simulated - measured) / measured, 4) if measured else 0.0


def mean(tables: Sequence[Any]) -> Any:
    """Of cost tables of the same cells, each of those that have measured it."""
    first = tables[0]
    if isinstance(first, dict):
        return {key: mean([table[key] for table in tables if key in table]) for key in first}
    if isinstance(first, int):
        return max(tables)
    measured = [value for value in tables if value >= 0]
    return sum(measured) / len(measured) if measured else first


def markdown(loads: Sequence[Mapping[str, Any]]) -> str:
    """A table."""
    lines = [
        "| load | model | requests | req/s service / simulated | TTFT, ms | TPOT, ms | holds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for load in loads:
        for row in (*load["rows"], load["all"]):
            one, other = row["service"], row["simulated"]
            lines.append(
                f"| {load['load']:g} | {row['model']} | {one['requests']} "
                f"| {one['throughput']:.2f} / {other['throughput']:.2f} ({row['throughput_error']:+.0%}) "
                f"| {one['ttft'] * 1e3:.0f} / {other['ttft'] * 1e3:.0f} ({row['ttft_error']:+.0%}) "
                f"| {one['tpot'] * 1e3:.1f} / {other['tpot'] * 1e3:.1f} ({row['tpot_error']:+.0%}) "
                f"| {'yes' if row['holds'] else 'no'} |"
            )
    return "\n".join(lines)


def plot(loads: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Simulated over measured; the bands are what is allowed."""
    import matplotlib  # takes a second, and only plots need it

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    titles = {"throughput": "requests/s", "ttft": "mean TTFT, s", "tpot": "mean TPOT, s"}
    for axes, (name, title) in zip(panes, titles.items(), strict=True):
        allowed = THROUGHPUT if name == "throughput" else LATENCY
        values = [row["service"][name] for load in loads for row in load["rows"]]
        ends = [0.0, 1.1 * max(values, default=1.0)]
        axes.fill_between(
            ends, [(1 - allowed) * e for e in ends], [(1 + allowed) * e for e in ends], color="0.9"
        )
        for load in loads:
            axes.plot(
                [row["service"][name] for row in load["rows"]],
                [row["simulated"][name] for row in load["rows"]],
                "o",
                label=f"load {load['load']:g}",
            )
        axes.set(title=title, xlabel="service", ylabel="simulated", xlim=ends, ylim=ends)
    panes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
