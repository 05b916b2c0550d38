"""Raw results as the tables of `docs/performance.md`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.engine.report import Grid


def markdown(folder: Path) -> str:
    """All tables of the results in `folder`. Raises OSError where there are none."""
    made: dict[str, Callable[[Any], Iterable[Grid]]] = {
        "skew": _skew,
        "cases": _cases,
        "overload": _overload,
        "tenants": _tenants,
    }
    found = []
    for section, make in made.items():
        path = folder / f"{section}.json"
        if path.exists():
            raw = json.loads(path.read_text(encoding="utf-8"))
            found += [grid.markdown() for grid in make(raw["measured"])]
    if not found:
        raise FileNotFoundError(f"no results in {folder}")
    return "\n".join(found)


def _skew(measured: list[dict[str, Any]]) -> Iterable[Grid]:
    for one in measured:
        floods: dict[str, list[float]] = {}
        for cell in one["saturated"]:
            floods.setdefault(cell["system"], []).append(cell["token_rate"])
        rows = [
            (name, _goodput(one["goodputs"].get(name)), " ".join(f"{rate:.0f}" for rate in rates))
            for name, rates in floods.items()
        ]
        title = f"alpha {one['alpha']:g}: goodput and saturated throughput"
        yield Grid(title, ("", "requests/s within the SLO", "tokens/s, saturated, by round"), tuple(rows))
        beside = [
            (f"{float(load):g}", *_cell(cell)) for load, cells in one["cells"].items() for cell in cells
        ]
        head = ("load", "", "met the SLO", "worst model", "TTFT P50", "P99", "TPOT P99", "tokens/s")
        yield Grid(f"alpha {one['alpha']:g}: side by side", head, tuple(beside))
        ratios = tuple((name, str(value)) for name, value in one["ratios"].items())
        yield Grid(f"alpha {one['alpha']:g}: ratios", ("", "value"), ratios)


def _goodput(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    below = f"fails at {found['below']:.2f}" if found["below"] else "none failed"
    requests = max((probe["requests"] for probe in found["probes"] if probe["passed"]), default=0)
    return f"{found['rate']:.2f} ({below}; {requests} requests)"


def _cell(cell: dict[str, Any]) -> tuple[str, ...]:
    report = cell["report"]
    total, worst = report["total"], report["models"].get(report["worst_model"], report["total"])
    times = (total["ttft"]["p50"], total["ttft"]["p99"], total["tpot"]["p99"])
    return (
        cell["system"],
        _attained(total),
        f"{report['worst_model']} {_attained(worst)}",
        *("-" if value is None else f"{1000 * value:.0f} ms" for value in times),
        f"{cell['token_rate']:.0f}",
    )


def _attained(summary: dict[str, Any]) -> str:
    """At the scale of the SLO, the last one."""
    value = list(summary["attainment"].values())[-1]
    return "-" if value is None else f"{value:.1%}"


def _cases(measured: list[dict[str, Any]]) -> Iterable[Grid]:
    for one in measured:
        models = list(one["cells"][0]["report"]["models"])
        rows = tuple(
            (
                cell["system"],
                f"{cell['token_rate']:.0f}",
                f"{cell['report']['total']['request_rate']:.2f}",
                *(f"{cell['report']['models'][model]['request_rate']:.2f}" for model in models),
            )
            for cell in one["cells"]
        )
        head = ("", "tokens/s", "requests/s", *models)
        yield Grid(f"{one['case']['name']}, saturated", head, rows)


def _overload(measured: dict[str, Any]) -> Iterable[Grid]:
    kept = {name: value for name, value in measured.items() if isinstance(value, int | float)}
    rows = tuple((name.replace("_", " "), f"{value:.4g}") for name, value in kept.items())
    yield Grid("Overload", ("", "value"), rows)


def _tenants(measured: dict[str, Any]) -> Iterable[Grid]:
    rows: tuple[tuple[str, ...], ...] = tuple(
        (name, *(f"{1000 * spread[part]:.0f} ms" for part in ("mean", "p50", "p99")))
        for name, spread in measured["others_ttft"].items()
    )
    ratios = tuple(
        (f"greedy over alike, {part}", "", "", f"{measured[f'others_{part}_ttft_ratio']:.2f}")
        for part in ("p50", "p99")
    )
    yield Grid("Tenants: the others' time to first token", ("", "mean", "P50", "P99"), rows + ratios)
