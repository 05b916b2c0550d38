"""What streams amount to: goodput in time, when it is back, and what migrations did to streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.online.streams import Stream
from muxserve.bench.latency import Slo


def met(stream: Stream, slo: Slo) -> bool:
    """Whether it was answered in full within its objective."""
    limit = slo.seconds(stream.model, stream.prompt_tokens, stream.asked)
    return stream.complete and stream.end - stream.at <= limit


def goodput(streams: Sequence[Stream], slo: Slo, begin: float, end: float) -> float:
    """Requests per second that arrived in [begin, end) and met their objective."""
    good = sum(met(stream, slo) for stream in streams if begin <= stream.at < end)
    return good / max(end - begin, 1e-9)


def part(streams: Sequence[Stream], slo: Slo, begin: float, end: float) -> float:
    """Of the requests that arrived in [begin, end), those that met their objective."""
    found = [met(stream, slo) for stream in streams if begin <= stream.at < end]
    return float(np.mean(found)) if found else 1.0


def series(streams: Sequence[Stream], slo: Slo, end: float, width: float) -> list[tuple[float, float, float]]:
    """(middle, goodput, arrivals per second) of windows of `width` seconds, one each second."""
    found = []
    for second in range(int(end - width) + 1):
        window = [s for s in streams if second <= s.at < second + width]
        good = sum(met(stream, slo) for stream in window)
        found.append((second + width / 2, good / width, len(window) / width))
    return found


def recovery(
    streams: Sequence[Stream],
    slo: Slo,
    flip: float,
    end: float,
    target: Callable[[float, float], float],
    width: float,
) -> float:
    """Seconds after `flip` until requests that arrive are served as well as wanted for good: the first moment
    from which windows of `width` are, and the rest as a whole. `target`: part of the requests that are to
    meet their objective, of those that arrive between two times. Infinity: never."""
    for moment in np.arange(flip, end - width, 1.0):
        spans = ((moment, moment + width), (moment, end))
        if all(part(streams, slo, *span) >= target(*span) for span in spans):
            return float(moment - flip)
    return float("inf")


def pauses(streams: Sequence[Stream], spans: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Longest pauses in milliseconds, of streams that paused during a migration (begin, end) and of all."""

    def during(stream: Stream) -> bool:
        back = stream.paused_at + stream.pause
        return any(begin <= back and stream.paused_at <= end for begin, end in spans)

    paused = [stream for stream in streams if stream.pause > 0]
    meanwhile = sorted((stream.pause for stream in paused if during(stream)), reverse=True)
    others = sorted((stream.pause for stream in paused if not during(stream)), reverse=True)
    return {
        "worst_during_migration_ms": round(1000 * meanwhile[0], 1) if meanwhile else 0.0,
        "p99_during_migration_ms": round(1000 * float(np.percentile(meanwhile, 99)), 1) if meanwhile else 0.0,
        "streams_during_migration": len(meanwhile),
        "worst_otherwise_ms": round(1000 * others[0], 1) if others else 0.0,
        "p99_otherwise_ms": round(1000 * float(np.percentile(others, 99)), 1) if others else 0.0,
    }


def accounts(streams: Sequence[Stream]) -> dict[str, Any]:
    """Nothing may be lost, and nothing come twice."""
    errors: dict[str, int] = {}
    for stream in streams:
        if stream.error:
            errors[stream.error] = errors.get(stream.error, 0) + 1
    return {
        "requests": len(streams),
        "complete": sum(stream.complete for stream in streams),
        "lost": sum(not stream.complete for stream in streams),
        "tokens_repeated": sum(stream.repeated for stream in streams),
        "tokens_skipped": sum(stream.skipped for stream in streams),
        "errors": errors,
    }


def migration_spans(history: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """(begin, end) of every time that a migration was under way."""
    spans: list[tuple[float, float]] = []
    begin: float | None = None
    for change in history:
        if "migration" in change and begin is None:
            begin = change["at"]
        elif "migration" not in change and begin is not None:
            spans.append((begin, change["at"]))
            begin = None
    if begin is not None and history:
        spans.append((begin, history[-1]["at"]))
    return spans


def raw(streams: Sequence[Stream]) -> dict[str, list[Any]]:
    """Columns."""
    rows = [asdict(stream) for stream in streams]
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}
    return {
        name: [round(value, 4) if isinstance(value, float) else value for value in column]
        for name, column in columns.items()
    }
