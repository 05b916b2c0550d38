"""`Executor`: a mesh that runs prefill and decode jobs beside each other, as a worker does.

Prefill jobs run one at a time, in the order in which they were sent; so do decode jobs, but on a device with
several decode lanes as many of different models run at once. A job alone has all of the mesh; beside others
it has its share, and all feel what `contention` says. Where a share is made of whole units, such as cores,
both kinds have them in proportion to their shares, decode jobs equal parts of theirs, and every job at least
one, also where that is more than there are. A prefill job whose neighbours end keeps its units: it is one
step. A decode job is one event, not one per step: its progress is counted in steps, and its speed changes
when a neighbour comes or goes.

A decode job may have prompts, which its first step computes in the same pass: that step is slower by what
their tokens cost beside the pass, and its end is an event too.

A job takes `order_seconds` from its decision to the device, but for a lease that follows on one that has just
ended, early or not: a scheduler sends that ahead. A decode job takes `lease_seconds` beside its steps, here
before the first; who asks how long it ran is told with them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from muxserve.placement.solver.contention import Beside, bandwidth_use, slowdown
from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.shapes import Shape

JobKind = Literal["prefill", "decode"]

PASS_TOKENS = 64
"""Tokens of a pass that costs little more than reading the weights. Prompts of a decode job take what as many
tokens more would add to it: the step that they are in reads the weights in any case."""


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
    exclusive: bool = False
    """Whether no other decode job runs beside it."""
    prompt: int = 0
    """Decode: tokens of prompts that the first step computes. 0 from its end on."""
    first: float = -1.0
    """When that step has ended, of a job with prompts."""
    done: float = 0.0
    """Steps that have run."""
    busy: float = 0.0
    """Seconds that it has run for."""
    beside: float = 0.0
    """Of these, those beside a job of the other kind."""
    together: float = 0.0
    """Of these, those of a decode job beside one of another model."""
    ready: float = 0.0
    """When it is at the device."""
    began: float = -1.0
    hold: float = 0.0
    """Seconds until its first step begins, once it runs."""
    ending: bool = False
    alone: float = 0.0
    """Seconds of a step with the whole mesh. 0: not looked up yet."""
    shared: float = 0.0
    """Seconds of a step with the share `had`."""
    had: float = 0.0
    """The share that it has beside its neighbour."""
    paired: bool = False
    """Whether `shared` is beside decode jobs alone."""


@dataclass(slots=True)
class Executor:
    """Time goes on when somebody calls `advance`."""

    costs: CostModel
    degree: int
    units: int = 0
    """What shares are made of; 0: any share can be had."""
    decode_lanes: int = 1
    """Decode jobs of different models that run at once."""
    order_seconds: float = 0.0
    lease_seconds: float = 0.0
    """See above."""
    lanes: dict[JobKind, deque[Work]] = field(default_factory=lambda: {"prefill": deque(), "decode": deque()})
    now: float = 0.0
    busy: float = 0.0
    """Seconds in which anything ran."""
    _speed: list[tuple[Work, float]] = field(default_factory=list)
    """The jobs that run, and their steps per second."""
    _due: bool = False
    """Whether speeds are to be worked out again."""
    _coming: float = float("inf")
    """When the next job gets to the device."""
    _lease_ended: float = -1.0
    """When the last lease has ended."""

    def start(self, work: Work) -> None:
        """Put a job at the end of its lane. The time is what `advance` was last told."""
        self.lanes[work.kind].append(work)
        self._due = True
        follows = work.kind == "decode" and self._lease_ended == self.now
        work.ready = self.now if follows else self.now + self.order_seconds
        work.hold = self.lease_seconds if work.kind == "decode" else 0.0
        if work.ready > self.now:
            self._coming = min(self._coming, work.ready)

    def end_lease(self, work: Work) -> None:
        """Let a decode job end with the step that runs; if it does not run yet, without any."""
        work.ending = True
        ran = work.began >= 0
        work.steps = min(work.steps, max(1, int(work.done + 1 - 1e-9))) if ran else 0
        if not ran:
            work.hold, work.prompt = 0.0, 0
        self._due = True

    def next_end(self) -> float:
        """When a job ends next, has computed its prompts or gets to the device, if nothing else happens.
        Infinity: there is none."""
        soonest = self._coming
        for work, speed in self._speeds():
            left = (1 if work.prompt else work.steps) - work.done
            end = self.now + work.hold + (left / speed if left > 0 else 0.0)
            if end < soonest:
                soonest = end
        return soonest

    def advance(self, now: float) -> list[Work]:
        """Let time pass until `now`, no later than `next_end()`; the jobs that have ended, in order."""
        elapsed = now - self.now
        running = self._speeds()
        if elapsed > 0 and running:
            decoding = sum(work.kind == "decode" for work, _ in running)
            for work, speed in running:
                held = min(work.hold, elapsed)
                work.hold -= held
                work.done += speed * (elapsed - held)
                work.busy += elapsed
                others = decoding if work.kind == "prefill" else len(running) - decoding
                work.beside += elapsed if others else 0.0
                work.together += elapsed if work.kind == "decode" and decoding > 1 else 0.0
                if work.prompt and work.done >= 1 - 1e-7:
                    self._joined(work, now)
            self.busy += elapsed
        self.now = now
        ended = [work for work, _ in running if work.done >= work.steps - 1e-7 and not work.hold]
        for work in ended:
            self.lanes[work.kind].remove(work)
            self._due = True
            if work.kind == "decode":
                self._lease_ended = now
        if now >= self._coming:
            later = [w.ready for lane in self.lanes.values() for w in lane if w.ready > now]
            self._coming = min(later, default=float("inf"))
            self._due = True
        return ended

    def _joined(self, work: Work, now: float) -> None:
        """Its prompts are computed: later steps are those of any decode job."""
        work.prompt, work.first, work.done = 0, now, 1.0
        work.alone = work.had = 0.0
        self._due = True

    def _speeds(self) -> list[tuple[Work, float]]:
        if self._due:
            self._due = False
            prefill = next((work for work in self.lanes["prefill"] if work.ready <= self.now), None)
            decoding = self._decoding(prefill)
            running = decoding if prefill is None else [prefill, *decoding]
            for work in running:
                if work.began < 0:
                    work.began = self.now
            if len(running) == 1:
                self._speed = [(running[0], 1 / self._lone(running[0]))]
            else:
                shares = self._shares(prefill, decoding)
                self._speed = self._together(running, shares, paired=prefill is None)
        return self._speed

    def _decoding(self, prefill: Work | None) -> list[Work]:
        """The decode jobs that run: those that did, and those sent first, one of each model, as many as there
        are lanes; an exclusive one alone."""
        room = self.decode_lanes
        if prefill is not None and room > 1:
            # Two jobs on one core would only be in each other's way.
            room = max(1, min(room, self.units - self._threads(prefill.share, 1 - prefill.share)))
        lane = self.lanes["decode"]
        chosen = {work.name: work for work in lane if work.began >= 0}
        for work in lane:
            if any(each.exclusive for each in chosen.values()):
                break
            if len(chosen) < room and work.ready <= self.now and work.name not in chosen:
                if work.exclusive and chosen:
                    break
                chosen[work.name] = work
        return list(chosen.values())

    def _threads(self, prefill: float, decode: float) -> int:
        """Units of a prefill job beside decode jobs."""
        return max(1, min(self.units - 1, round(self.units * prefill / (prefill + (decode or prefill)))))

    def _shares(self, prefill: Work | None, decoding: Sequence[Work]) -> list[float]:
        """Of the jobs that run, the prefill job first."""
        if not self.units:
            return [work.share for work in ([prefill] if prefill else []) + list(decoding)]
        if prefill is None:
            return [max(1, self.units // len(decoding)) / self.units for _ in decoding]
        if self.units == 1:
            return [0.5] * (1 + len(decoding))
        threads = self._threads(prefill.share, decoding[0].share) if decoding else self.units
        rest = [max(1, (self.units - threads) // len(decoding)) / self.units for _ in decoding]
        return [threads / self.units, *rest]

    def _together(
        self, running: Sequence[Work], shares: Sequence[float], paired: bool
    ) -> list[tuple[Work, float]]:
        """`paired`: all of them decode."""
        felt = (self._felt(work, share, paired) for work, share in zip(running, shares, strict=True))
        slower = slowdown(*felt)
        return [(work, 1 / (work.shared * slower)) for work in running]

    def _lone(self, work: Work) -> float:
        """Seconds of a step of the only job that runs."""
        if self.units and work.kind == "prefill" and work.had:
            return work.shared
        return self._alone(work)

    def _alone(self, work: Work) -> float:
        if not work.alone:
            work.alone = self._seconds(work, 1.0, False)
        return work.alone

    def _felt(self, work: Work, share: float, paired: bool) -> Beside:
        if work.had != share or work.paired != paired:
            work.shared = self._seconds(work, share, paired)
            work.had, work.paired = share, paired
        tokens = work.batch * work.length
        return Beside(share, bandwidth_use(work.shape, self.degree, tokens, work.shared))

    def _seconds(self, work: Work, share: float, paired: bool) -> float:
        decode = self.costs.together if paired else self.costs.decode
        look_up = self.costs.prefill if work.kind == "prefill" else decode
        seconds = max(1e-6, look_up(work.model, self.degree, share, work.batch, work.length))
        return seconds + self._beyond(work, share) if work.prompt else seconds

    def _beyond(self, work: Work, share: float) -> float:
        """Seconds that its prompts add to its first step."""
        few, more = (
            self.costs.prefill(work.model, self.degree, share, 1, PASS_TOKENS + tokens)
            for tokens in (0, work.prompt)
        )
        return max(0.0, more - few)
