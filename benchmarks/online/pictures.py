"""A run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(found: dict[str, Any], path: Path) -> None:
    """Goodput in time, who is loaded where, and pauses of streams."""
    import matplotlib  # takes a second, and only plots need it

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (rates, places, pauses) = pyplot.subplots(
        3, 1, figsize=(10, 8), sharex=True, layout="constrained", height_ratios=(3, 2, 2)
    )
    summary, flip = found["summary"], found["plan"]["before"]
    at, good, arrived = zip(*found["series"], strict=True)
    rates.plot(at, arrived, color="0.7", label="arrived")
    rates.plot(at, good, label="answered within the SLO")
    rates.axhline(summary["goodput_static"], linestyle="--", color="C2", label="best static placement, after")
    rates.axvline(flip, color="0.3", linewidth=0.8)
    if summary["recovered_after_s"] is not None:
        rates.axvline(flip + summary["recovered_after_s"], color="C2", linewidth=0.8, linestyle=":")
    rates.set(title="popularity flips", ylabel="requests/s", ylim=0)
    rates.legend(fontsize="small")
    _places(places, found)
    streams = found["streams"]
    moments = [p for p, pause in zip(streams["paused_at"], streams["pause"], strict=True) if pause]
    pauses.plot(moments, [pause for pause in streams["pause"] if pause], ".", markersize=2)
    pauses.set(ylabel="longest pause\nof a stream, s", xlabel="seconds", yscale="log")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _places(axes: Any, found: dict[str, Any]) -> None:
    """A line for each model and worker while it is ready there."""
    history = found["history"]
    rows = sorted({(w, m) for change in history for w, models in change["units"].items() for m in models})
    end = found["plan"]["before"] + found["plan"]["after"]
    colours = {"ready": "C0", "loading": "C1", "draining": "C3", "asleep": "0.85"}
    for number, (worker, model) in enumerate(rows):
        for change, after in zip(history, [*history[1:], {"at": end}], strict=True):
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
