"""`Forecast`: when a request would be finished. What cannot be in time is refused at once.

Between now and its end a request waits for the prompts that go before its own, and until enough of what
decodes has ended for it to join; then it decodes at the pace of so many. All of that is estimated from the
fitted latencies, and read as earlier estimates came true (`Hindsight`). What comes differs from it by the
sum of many small delays: its spread grows with the square root of the time. An estimate is increased by as
much of that as keeps deadlines from being missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from muxserve.scheduler.policy.hindsight import Hindsight
from muxserve.scheduler.policy.interface import Finished, JobEnded, ModelSnapshot, Waiting
from muxserve.scheduler.policy.latency import Latency

MEMORY = 0.05
"""Weight of the newest observation."""
CORRECTION = 0.1
"""By how much the spread grows for a deadline that is missed, in seconds per square root of a second."""
LATE = 0.01
"""Part of the requests with a deadline that may miss it: the spread grows until no more do."""
QUICK = 1.0
"""Seconds over which it is averaged how much prefill there is."""
LEAST_SPREAD, MOST_SPREAD = 0.7, 3.0
"""In seconds per square root of a second."""
DECISIONS = 16
"""Decisions over which it is averaged how many are refusals."""
PRESSED = 0.25
"""Part of decisions that are refusals from which a missed deadline says something about the spread, and a
crowded moment does not pass: others take the place of whoever leaves."""
FIRST_RETRY, LAST_RETRY = 0.2, 30.0
"""Seconds after which a refused request may come again."""
HALF_LIFE = 60.0
"""Seconds without refusals in which half of that is forgotten."""
NEAR = 30.0
"""Times as long as it takes alone that a request may have at most to say how estimates came true: those with
more may have been put off."""
EXPIRED = 1.1
"""Times as long as it was allowed that a request is taken to need that was not finished in time."""
KEPT = 20_000
"""Admitted requests remembered."""


class Crowd(NamedTuple):
    """How often what decodes gets a token, as one model's sequences see it, in seconds."""

    now: float
    growth: float
    """What each sequence that joins adds."""
    limit: float
    """What it may become."""


class Estimate(NamedTuple):
    """What a request takes from now on, in seconds."""

    seconds: float
    """If all goes on as it does now."""
    alone: float
    """With the device for itself."""


class _Admitted(NamedTuple):
    """A request that is to be finished before its deadline."""

    allowed: float
    """Seconds from its arrival to its deadline."""
    spread: float
    """That by which it was admitted. 0: nothing was refused then."""
    waited: float
    """Seconds from its arrival to the estimate."""
    estimate: Estimate


class Forecast:
    """The estimates of one unit, and how they came true."""

    def __init__(self, latency: Latency) -> None:
        self._latency = latency
        self._used: dict[str, float] = {}
        """Part of the tokens that requests of a model may generate which they do."""
        self._admitted: dict[int, _Admitted] = {}
        self._hindsight = Hindsight()
        self._spread = LEAST_SPREAD
        self._refusing = 0.0
        """Part of the last decisions that were refusals."""
        self._seen = 0.0
        self._late = 0.0
        """Part of what runs that will miss its deadline as things are."""
        self.beside = 0.0
        """Part of their time in which decode jobs have a prefill job beside them."""

    def observe(self, event: JobEnded | Finished) -> None:
        """Learn from what ended."""
        if isinstance(event, JobEnded):
            if event.kind == "decode":
                self.beside += min(1.0, event.seconds / QUICK) * (event.beside - self.beside)
            return
        if not event.expired:
            used = event.output / max(1, event.most)
            before = self._used.setdefault(event.model, used)
            self._used[event.model] = before + MEMORY * (used - before)
        if (admitted := self._admitted.pop(event.sequence, None)) is not None:
            self._learn(admitted, event.seconds * (EXPIRED if event.expired else 1.0))

    def _learn(self, admitted: _Admitted, seconds: float) -> None:
        """It was finished so many seconds after its arrival."""
        estimated, alone = admitted.estimate
        if admitted.allowed < NEAR * alone:
            self._hindsight.observe(estimated / alone, (seconds - admitted.waited) / alone)
        if not admitted.spread:
            return
        if seconds > admitted.allowed:
            # Many that were admitted by one estimate say no more against it than one of them.
            self._spread = min(MOST_SPREAD, max(self._spread, admitted.spread + CORRECTION))
        else:
            self._spread = max(LEAST_SPREAD, self._spread - CORRECTION * LATE / (1 - LATE))

    def output(self, model: str, most: int) -> int:
        """Tokens that a request will generate which may generate so many."""
        return max(1, math.ceil(most * self._used.get(model, 1.0)))

    @property
    def pressed(self) -> bool:
        """Whether much of what comes is refused: what was admitted is to be in time, then."""
        return self._refusing > PRESSED

    def known(self, model: str) -> bool:
        """Whether enough was seen of the model to refuse a request."""
        return model in self._used and self._latency.known(model)

    def admitted(self, sequence: int) -> bool:
        """Whether it was decided on before."""
        return sequence in self._admitted

    def refuse(self) -> None:
        """It would be late."""
        self._refusing += (1 - self._refusing) / DECISIONS

    def admit(self, waiting: Waiting, now: float, estimate: Estimate) -> None:
        """It is to be finished before its deadline."""
        self._refusing -= self._refusing / DECISIONS
        if len(self._admitted) >= KEPT:
            del self._admitted[next(iter(self._admitted))]
        allowed, waited = waiting.deadline - waiting.arrival, now - waiting.arrival
        spread = self._spread if self.pressed else 0.0
        self._admitted[waiting.sequence] = _Admitted(allowed, spread, waited, estimate)

    @property
    def prefill_pace(self) -> float:
        """Seconds that a second of prefill takes beside what decodes."""
        return self._latency.beside("prefill")

    def look(self, now: float, models: Iterable[ModelSnapshot], pace: Callable[[str], float]) -> None:
        """Time passes: what was learned of a busy time fades. Who will be late at the `pace` of now, in
        seconds per token by model, says that there is too much before the first deadline is missed."""
        seen = late = 0
        for m in models:
            if not m.running:
                continue
            lone = self._latency.lone_step(m.model)
            each = self._used.get(m.model, 1.0) * lone * self._hindsight(pace(m.model) / lone)
            for r in m.running:
                if (admitted := self._admitted.get(r.sequence)) is not None:
                    seen += 1
                    late += now + (r.limit - r.length) * each > r.arrival + admitted.allowed
        self._late = late / seen if seen else 0.0
        more = self._spread - LEAST_SPREAD
        passed = (1 - self._refusing) * max(0.0, now - self._seen)
        self._spread = LEAST_SPREAD + more * 0.5 ** (passed / HALF_LIFE)
        self._seen = now

    def estimate(
        self,
        models: Iterable[ModelSnapshot],
        ahead: float,
        seats: int,
        wanted: int,
        crowd: Crowd,
        own: tuple[float, int, float],
    ) -> Estimate:
        """What a request takes. ahead: seconds of prompts before its own. seats: sequences that decode;
        wanted: that want to before it. own: seconds of its prompt, tokens of its output, seconds of a step
        of it alone.
        """
        prompt, output, step = own
        fit = max(1.0, seats + (crowd.limit - crowd.now) / crowd.growth) if crowd.growth else math.inf
        left = sum(m.left * self._used.get(m.model, 1.0) for m in models)
        short = max(0.0, seats + wanted + 1 - fit)
        leave = left / max(1, seats) * crowd.now / max(1, seats)
        wait = max(ahead * self.prefill_pace, short * leave)
        pace = max(step, min(max(crowd.limit, crowd.now), crowd.now + crowd.growth * (wanted + 1)))
        return Estimate(wait + prompt * self.prefill_pace + output * pace, prompt + output * step)

    def seconds(self, estimate: Estimate) -> float:
        """Seconds until the end of a request, as far as one can be sure of it."""
        seconds = estimate.alone * self._hindsight(estimate.seconds / estimate.alone)
        seconds += min(1.0, self._refusing / PRESSED) * (estimate.seconds - seconds)
        return seconds + max(self._refusing, self._late) * self._spread * math.sqrt(seconds)


def retry_after(late: float) -> float:
    """Seconds after which a request that would have been so late may come again."""
    return min(LAST_RETRY, max(FIRST_RETRY, late))
