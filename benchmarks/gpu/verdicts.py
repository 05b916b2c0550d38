"""What is asked of the engine on a GPU, and whether it was found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

Found = dict[str, Any]

MIB = 2**20


def verdicts(sections: dict[str, Found]) -> Iterator[str]:
    """One a line; "?" for what was not measured."""
    for name, bound, value, most in _asked(sections):
        what = f"{'at most' if most else 'at least'} {bound:g}"
        if value is None or math.isnan(value):
            yield f"  ?    {name}: {what}"
            continue
        good = value <= bound if most else value >= bound
        yield f"  {'yes' if good else 'NO':4} {name}: {value:.3g}, {what}"


def _asked(sections: dict[str, Found]) -> Iterator[tuple[str, float, float | None, bool]]:
    """(what, bound, value, whether the bound is the most that it may be)."""
    wrong = [
        len(sections[name]["failed"]) for name in ("kernels", "parity") if "failed" in sections.get(name, {})
    ]
    yield "kernels and families that are wrong", 0, float(sum(wrong)) if wrong else None, True
    attention = sections.get("attention", {}).get("decode", [])
    ratios = [one["vs_contiguous"] for one in attention if one.get("vs_contiguous") is not None]
    yield "decode attention on blocks over contiguous, median shape", 0.9, _median(ratios), False
    llama: Found = sections.get("models", {}).get("shapes", {}).get("Llama-3-8B", {})
    steps = (one for one in llama.get("decode", []) if (one["batch"], one["context"]) == (32, 2048))
    yield "decode of Llama-3-8B, 32 x 2,048, of the bandwidth limit", 0.7, _of(steps, "of_bandwidth"), False
    jobs = (one for one in llama.get("prefill", []) if one["prompts"] * one["length"] == 8192)
    yield (
        "prefill of Llama-3-8B, 8,192 tokens, of the products' ceiling",
        0.55,
        _of(jobs, "of_products"),
        False,
    )
    shared = sections.get("multiplexing", {}).get("gain_over_turns")
    yield "work of prefill beside decode on the best share, over turns", 1.3, shared, False
    workloads = sections.get("peer", {}).get("workloads", [])
    peers = [one["ours_over_theirs"] for one in workloads if one.get("ours_over_theirs") is not None]
    yield (
        "tokens/s over transformers' continuous batching, worst workload",
        2.0,
        min(peers, default=None),
        False,
    )
    extra = sections.get("memory", {}).get("most_beyond_weights")
    yield "MiB of a model more beyond its weights", 100, None if extra is None else extra / MIB, True


def _of(found: Iterator[Found], key: str) -> float | None:
    """Of the first of them."""
    value: float | None = next(found, {}).get(key)
    return value


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
