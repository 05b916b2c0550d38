"""`Executor`: a mesh that runs at most one prefill and one decode job at a time, as a worker does.

Each kind has a lane: jobs run in the order in which they were sent. A job alone has all of the mesh; beside
one of the other kind it has its share, and both feel what `contention` says. A decode job is one event, not
one per step: its progress is counted in steps, and its speed changes when a neighbour comes or goes. Where a
share is made of whole units, such as cores, two jobs have them in proportion and at least one each.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from muxserve.placement.solver.contention import Beside, bandwidth_use, slowdown
from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.shapes import Shape

JobKind = Literal["prefill", "decode"]


@dataclass(slots=True, eq=False)
class Work:
    """A job as the executor sees it."""

    number: int
    kind: JobKind
    name: str
    """The served model."""
    model: str
    """The cost model's name for it."""
    shape: Shape
    batch: int
    length: float
    """Prefill: mean tokens of a chunk. Decode: mean tokens known, half-way through."""
    share: float
    steps: int = 1
    """Decode: after how many it ends. Prefill: 1."""
    done: float = 0.0
    """Steps that have run."""
    busy: float = 0.0
    """Seconds that it has run for."""
    beside: float = 0.0
    """Of these, those beside a job of the other kind."""
    began: float = -1.0
    ending: bool = False
    alone: float = 0.0
    """Seconds of a step with the whole mesh. 0: not looked up yet."""
    shared: float = 0.0
    """Seconds of a step with the share `had`."""
    had: float = 0.0
    """The share that it has beside its neighbour."""


@dataclass(slots=True)
class Executor:
    """Time goes on when somebody calls `advance`."""

    costs: CostModel
    degree: int
    units: int = 0
    """What shares are made of; 0: any share can be had."""
    lanes: dict[JobKind, deque[Work]] = field(default_factory=lambda: {"prefill": deque(), "decode": deque()})
    now: float = 0.0
    busy: float = 0.0
    """Seconds in which anything ran."""
    _speed: dict[JobKind, float] = field(default_factory=dict)
    """Steps per second of the jobs that run."""
    _due: bool = False
    """Whether speeds are to be worked out again."""

    def start(self, work: Work) -> None:
        """Put a job at the end of its lane. The time is what `advance` was last told."""
        self.lanes[work.kind].append(work)
        self._due = True

    def end_lease(self, work: Work) -> None:
        """Let a decode job end with the step that runs; if it does not run yet, without any."""
        work.ending = True
        ran = work.began >= 0
        work.steps = min(work.steps, max(1, int(work.done + 1 - 1e-9))) if ran else 0
        self._due = True

    def next_end(self) -> float:
        """When a job ends next, if nothing else happens. Infinity: none runs."""
        speeds = self._speeds()
        return min(
            (
                self.now + max(0.0, self.lanes[kind][0].steps - self.lanes[kind][0].done) / speed
                for kind, speed in speeds.items()
            ),
            default=float("inf"),
        )

    def advance(self, now: float) -> list[Work]:
        """Let time pass until `now`, no later than `next_end()`; the jobs that have ended, in order."""
        elapsed = now - self.now
        speeds = self._speeds()
        if elapsed > 0:
            for kind, speed in speeds.items():
                work = self.lanes[kind][0]
                work.done += speed * elapsed
                work.busy += elapsed
                work.beside += elapsed if len(speeds) == 2 else 0.0
            self.busy += elapsed if speeds else 0.0
        self.now = now
        ended = []
        for lane in self.lanes.values():
            while lane and lane[0].done >= lane[0].steps - 1e-7:
                ended.append(lane.popleft())
                self._due = True
        return ended

    def _speeds(self) -> dict[JobKind, float]:
        if self._due:
            self._due = False
            heads = [lane[0] for lane in self.lanes.values() if lane]
            for work in heads:
                if work.began < 0:
                    work.began = self.now
            if len(heads) == 1:
                self._speed = {heads[0].kind: 1 / self._alone(heads[0])}
            else:
                self._speed = self._together(*heads) if heads else {}
        return self._speed

    def _together(self, one: Work, other: Work) -> dict[JobKind, float]:
        first, second = self._divide(one.share, other.share)
        slower = slowdown(self._felt(one, first), self._felt(other, second))
        return {work.kind: 1 / (work.shared * slower) for work in (one, other)}

    def _divide(self, one: float, other: float) -> tuple[float, float]:
        """The shares that two jobs have."""
        if not self.units:
            return one, other
        if self.units == 1:
            return 0.5, 0.5
        mine = max(1, min(self.units - 1, round(self.units * one / (one + other))))
        return mine / self.units, (self.units - mine) / self.units

    def _alone(self, work: Work) -> float:
        if not work.alone:
            work.alone = self._seconds(work, 1.0)
        return work.alone

    def _felt(self, work: Work, share: float) -> Beside:
        if work.had != share:
            work.shared, work.had = self._seconds(work, share), share
        tokens = work.batch * work.length
        return Beside(share, bandwidth_use(work.shape, self.degree, tokens, work.shared))

    def _seconds(self, work: Work, share: float) -> float:
        look_up = self.costs.prefill if work.kind == "prefill" else self.costs.decode
        return max(1e-6, look_up(work.model, self.degree, share, work.batch, work.length))
