"""Runs as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TITLES = {"by_advisor": "with rebalancing on", "by_hand": "by hand: `muxserve rebalance`"}


def plot(record: dict[str, Any], path: Path) -> None:
    """For each run: goodput in time, who is loaded where, and pauses of streams."""
    import matplotlib  # takes a second, and only plots need it

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        3, 2, figsize=(16, 8), sharex="col", sharey="row", layout="constrained", height_ratios=(3, 2, 2)
    )
    for (name, run), (rates, places, pauses) in zip(record["runs"].items(), axes.T, strict=True):
        _rates(rates, record["summary"], name, run)
        _places(places, run)
        streams = run["streams"]
        known = [(at, p) for at, p in zip(streams["paused_at"], streams["pause"], strict=True) if p]
        pauses.plot(*zip(*known, strict=True), ".", markersize=2)
        pauses.set(ylabel="longest pause\nof a stream, s", xlabel="seconds", yscale="log")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _rates(axes: Any, summary: dict[str, Any], name: str, run: dict[str, Any]) -> None:
    at, good, arrived = zip(*run["series"], strict=True)
    axes.plot(at, arrived, color="0.7", label="arrived")
    axes.plot(at, good, label="answered within the SLO")
    axes.axhline(summary["goodput_static"], linestyle="--", color="C2", label="best static placement, after")
    axes.axvline(run["flip"], color="0.3", linewidth=0.8)
    recovered = summary[name]["recovered_after_s"]
    if recovered is not None:
        axes.axvline(run["flip"] + recovered, color="C2", linewidth=0.8, linestyle=":")
    axes.set(title=f"popularity flips, {TITLES[name]}", ylabel="requests/s", ylim=0)
    axes.legend(fontsize="small")


def _places(axes: Any, run: dict[str, Any]) -> None:
    """A line for each model and worker while it is ready there."""
    history = run["history"]
    rows = sorted({(w, m) for change in history for w, models in change["units"].items() for m in models})
    colours = {"ready": "C0", "loading": "C1", "draining": "C3", "asleep": "0.85"}
    for number, (worker, model) in enumerate(rows):
        for change, after in zip(history, [*history[1:], {"at": run["end"]}], strict=True):
            state = change["units"].get(worker, {}).get(model)
            if state in colours:
                axes.plot(
                    (change["at"], after["at"]),
                    (number, number),
                    color=colours[state],
                    linewidth=4,
                    solid_capstyle="butt",
                )
    axes.set_yticks(range(len(rows)), [f"{model} on {worker}" for worker, model in rows], fontsize="x-small")
