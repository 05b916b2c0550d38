"""Prefill of one model beside decode of another: by turns, on two streams, and on shares of the SMs.

Work per second counts tokens by what they cost alone: a model that runs alone makes one unit of work per
second, and so do two that take turns, whatever their turns. What is more is the gain of running side by side.
Compared at equal latency of a decode step: turns can have any, for the same work.
"""

from __future__ import annotations

import itertools
import select
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.context import Context
from benchmarks.gpu.shapes import LLAMA_3_8B, TINY_SHAPES, Shape
from benchmarks.gpu.unit import ALONE, Unit, collect
from muxserve.engine.messages import Shares
from muxserve.engine.runner import RunningJob
from muxserve.engine.shares import PartitionName

PREFILL_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
TURNS = (4, 16, 64)
"""Decode steps after each prefill job, where the two take turns."""


@dataclass(frozen=True)
class Plan:
    """batch sequences decode, at `context` tokens; prompts of `prompt` tokens are computed one by one.
    window: seconds that are measured, after as many that are not."""

    shape: Shape
    batch: int
    context: int
    lease: int
    prompt: int
    window: float
    arena_bytes: int

    @staticmethod
    def of(context: Context) -> Plan:
        if context.tiny:
            return Plan(TINY_SHAPES[1], 2, 24, 2, 9, 0.0, 1 << 20)
        return Plan(LLAMA_3_8B, 32, 2048, 32, 2048, 1.2, 12 << 30)


@dataclass
class Kind:
    """The jobs of one kind, one after another. moments: (time, tokens) of what has come."""

    start: Callable[[], RunningJob]
    tokens: int
    """Of a step: each is told with how many it is."""
    job: RunningJob | None = None
    moments: list[tuple[float, int]] = field(default_factory=list)

    def collect(self, now: float) -> None:
        """What has come; a job that has ended is gone. Raises its fault."""
        if self.job is None:
            return
        ended = self.job.ended
        collect(self.job, lambda _: self.moments.append((now, self.tokens)))
        if ended:
            if self.job.error is not None:
                raise self.job.error
            self.job = None


def run(context: Context) -> dict[str, Any]:
    """Alone, by turns and on two streams with one runner; shares with another."""
    plan = Plan.of(context)
    found: dict[str, Any] = {"plan": {**vars(plan), "shape": plan.shape.name}, "points": []}
    with Unit(context, plan.arena_bytes) as unit:
        context.keep(found, "weights")
        stage = _Stage(unit, plan)
        for partition in ("none", "green_contexts"):
            try:
                unit.open(partition)
            except (ValueError, RuntimeError) as error:  # it cannot be had here
                found[f"no_{partition}"] = str(error)
                continue
            found[f"{partition}_because"] = unit.reason
            _points(context, stage, partition, found)
    context.keep(found | compared(found["points"]))
    return found | compared(found["points"])


def _points(context: Context, stage: _Stage, partition: PartitionName, found: dict[str, Any]) -> None:
    points = found["points"]

    def point(way: str, shares: Shares, measured: dict[str, Any]) -> None:
        points.append({"way": way, "partition": partition, "prefill_share": shares.prefill, **measured})

    context.keep(found, f"{partition}: alone")
    if partition == "none":
        point("alone", ALONE, stage.together(decode=True))
        point("alone", ALONE, stage.together(prefill=True))
        for steps in TURNS[:1] if context.tiny else TURNS:
            context.keep(found, f"by turns, {steps} steps")
            point("turns", ALONE, stage.turns(steps))
        context.keep(found, "two streams")
        point("streams", Shares(0.5, 0.5), stage.together(Shares(0.5, 0.5), decode=True, prefill=True))
        return
    for share in PREFILL_SHARES[:1] if context.tiny else PREFILL_SHARES:
        if not context.enough(3 * stage.plan.window + 1):
            found["left_out"] = f"prefill shares from {share} on"
            return
        shares = Shares(share, round(1 - share, 3))
        context.keep(found, f"{share:.0%} for prefill")
        point("shares", shares, stage.together(shares, decode=True, prefill=True))


class _Stage:
    """Two models, placed."""

    def __init__(self, unit: Unit, plan: Plan) -> None:
        self.plan = plan
        self._unit = unit
        self._decoding = unit.add("decoding", plan.shape, plan.batch, plan.context + 1)
        self._prefilling = unit.add("prefilling", plan.shape, 2, plan.prompt + 1, seed=1)
        self._slots = unit.place(self._decoding, [plan.context] * plan.batch)
        self._prompts = unit.place(self._prefilling, [plan.prompt] * 2)
        self._number = 0

    def together(
        self, shares: Shares = ALONE, *, decode: bool = False, prefill: bool = False
    ) -> dict[str, Any]:
        """Jobs of these kinds, each followed by the next, until the window is over."""
        kinds = {}
        if decode:
            kinds["decode"] = Kind(lambda: self._decode(self.plan.lease, shares), self.plan.batch)
        if prefill:
            kinds["prefill"] = Kind(lambda: self._prefill(shares), self.plan.prompt)
        begun = time.perf_counter()
        opens, closes = begun + self.plan.window, begun + 2 * self.plan.window
        # Without a window, until there is enough of each to tell how long one takes.
        while time.perf_counter() < closes or any(len(kind.moments) < 3 for kind in kinds.values()):
            for kind in kinds.values():
                kind.job = kind.job or kind.start()
            self._wait(kinds)
        for kind in kinds.values():
            if kind.job is not None:
                kind.job.stop()
        while any(kind.job is not None for kind in kinds.values()):
            self._wait(kinds)
        return {name: _rate(kind.moments, opens, closes) for name, kind in kinds.items()}

    def turns(self, steps: int) -> dict[str, Any]:
        """A prompt, then so many decode steps, and so on."""
        decode = Kind(lambda: self._decode(steps, ALONE), self.plan.batch)
        prefill = Kind(lambda: self._prefill(ALONE), self.plan.prompt)
        begun = time.perf_counter()
        opens, closes = begun + self.plan.window, begun + 2 * self.plan.window
        ends: list[float] = []
        while time.perf_counter() < closes or len(ends) < 3:
            for kind in (prefill, decode):
                kind.job = kind.start()
                while kind.job is not None:
                    self._wait({"": kind})
            # Whole turns are counted: from the end of one decode job to the end of another.
            if (now := decode.moments[-1][0]) >= opens:
                ends.append(now)
        passed = ends[-1] - ends[0]
        turns = len(ends) - 1
        return {
            "steps": steps,
            "decode": {
                "tokens_per_s": turns * steps * self.plan.batch / passed,
                "latency_s": passed / (turns * steps),
            },
            "prefill": {"tokens_per_s": turns * self.plan.prompt / passed, "latency_s": passed / turns},
        }

    def _decode(self, steps: int, shares: Shares) -> RunningJob:
        steps = min(steps, self.plan.context - 1)
        rows = dict.fromkeys(self._slots, self.plan.context - steps)
        return self._unit.decode(self._decoding, rows, steps, shares)

    def _prefill(self, shares: Shares) -> RunningJob:
        self._number += 1
        slot = self._prompts[self._number % len(self._prompts)]
        return self._unit.prefill(self._prefilling, {slot: (0, self.plan.prompt)}, shares)

    def _wait(self, kinds: dict[str, Kind]) -> None:
        select.select([self._unit.runner], [], [], 60)
        self._unit.runner.acknowledge()
        now = time.perf_counter()
        for kind in kinds.values():
            kind.collect(now)


def _rate(moments: list[tuple[float, int]], opens: float, closes: float) -> dict[str, Any]:
    """Of what came between the first and the last moment of the window, if that has any; else of all."""
    inside = [one for one in moments if opens <= one[0] <= closes]
    if len(inside) < 2:
        inside = moments
    times = [at for at, _ in inside]
    gaps = sorted(b - a for a, b in itertools.pairwise(times))
    passed = times[-1] - times[0]
    return {
        "tokens_per_s": sum(tokens for _, tokens in inside[1:]) / passed if passed > 0 else float("nan"),
        "count": len(inside),
        "latency_s": passed / (len(inside) - 1),
        "median_s": statistics.median(gaps),
        "p95_s": gaps[int(0.95 * (len(gaps) - 1))],
    }


def compared(points: list[dict[str, Any]]) -> dict[str, Any]:
    """Enters the work of each point; the best one beside turns, which at equal latency do what turns do."""
    alone = {
        kind: point[kind]["tokens_per_s"]
        for point in points
        if point["way"] == "alone"
        for kind in ("decode", "prefill")
        if kind in point
    }
    for point in points:
        kinds = [kind for kind in ("decode", "prefill") if kind in point and kind in alone]
        point["work"] = sum(point[kind]["tokens_per_s"] / alone[kind] for kind in kinds)
    turns = max((point["work"] for point in points if point["way"] == "turns"), default=float("nan"))
    shared = [point for point in points if point["way"] == "shares"]
    found: dict[str, Any] = {"alone_tokens_per_s": alone, "work_of_turns": turns}
    if shared:
        best = max(shared, key=lambda point: float(point["work"]))
        found |= {"best_share": best["prefill_share"], "best_work": best["work"]}
        found["gain_over_turns"] = best["work"] / turns
    streams = [point for point in points if point["way"] == "streams"]
    if streams and shared:
        own = streams[0]
        quick = [p["work"] for p in shared if p["decode"]["latency_s"] <= own["decode"]["latency_s"]]
        found["gain_over_streams_at_their_latency"] = max(quick, default=float("nan")) / own["work"]
    return found
