"""From what was measured to figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.online import judging
from benchmarks.online.experiment import Flip, Found, Plan
from benchmarks.online.streams import Stream

RESTORED = 0.9
"""Part of the best static placement's goodput that counts as recovered."""


def judge(plan: Plan, found: Found) -> dict[str, Any]:
    """The summary, and all that it comes from."""
    slo = found.slo
    met = {
        name: judging.part(streams, slo, plan.settled, plan.after)
        for name, (_, streams) in found.statics.items()
    }
    best = max(met, key=lambda name: met[name])
    best_streams = found.statics[best][1]
    summary = {
        "rate": round(found.rate, 3),
        "best_static": best,
        "met_static": {name: round(value, 4) for name, value in met.items()},
        "goodput_static": round(judging.goodput(best_streams, slo, plan.settled, plan.after), 3),
        "by_advisor": _flip(plan, found, found.by_advisor, best_streams),
        "by_hand": _flip(plan, found, found.by_hand, best_streams) | {"asked": found.by_hand.asked},
    }
    return {
        "summary": summary,
        "runs": {
            name: {
                "flip": flip.flip,
                "end": flip.end,
                "history": flip.history,
                "series": judging.series(flip.run.streams, slo, flip.end, plan.width),
                "streams": judging.raw(flip.run.streams),
            }
            for name, flip in (("by_advisor", found.by_advisor), ("by_hand", found.by_hand))
        },
        "statics": {
            name: {
                "placement": {model: sorted(at) for model, at in placement.items()},
                "streams": judging.raw(streams),
            }
            for name, (placement, streams) in found.statics.items()
        },
        "unloaded": asdict(next(iter(slo.unloaded.values()))),
    }


def _flip(plan: Plan, found: Found, flip: Flip, static: Sequence[Stream]) -> dict[str, Any]:
    """`static`: what became of the same arrivals where models were best placed for them."""
    streams, slo = flip.run.streams, found.slo
    settled = flip.flip + plan.settled
    met_after = judging.part(streams, slo, settled, flip.end)
    met_static = judging.part(static, slo, plan.settled, plan.after)

    def wanted(begin: float, end: float) -> float:
        return RESTORED * judging.part(static, slo, begin - flip.flip, end - flip.flip)

    recovered = judging.recovery(streams, slo, flip.flip, flip.end, wanted, plan.width)
    loads: dict[str, float] = {}
    for change in flip.history:
        if "migration" in change and change["migration"]["phase"] == "loading":
            loads.setdefault(change["migration"]["id"], change["at"])
    return {
        "recovered_after_s": recovered if recovered != float("inf") else None,
        "met_before": round(judging.part(streams, slo, flip.flip / 2, flip.flip), 4),
        "met_first_seconds": round(judging.part(streams, slo, flip.flip, flip.flip + plan.width), 4),
        "met_after": round(met_after, 4),
        "met_after_vs_static": round(met_after / met_static, 4) if met_static else None,
        "goodput_before": round(judging.goodput(streams, slo, flip.flip / 2, flip.flip), 3),
        "goodput_after": round(judging.goodput(streams, slo, settled, flip.end), 3),
        "loads_after_s": [round(at - flip.flip, 1) for at in loads.values() if at >= flip.flip],
        "accounts": judging.accounts(streams),
        "pauses": judging.pauses(streams, judging.migration_spans(flip.history)),
    }
