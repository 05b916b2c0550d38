"""`Residency`: which models have their weights loaded. Pure: a view in, whom to wake and put to sleep out.

A place is a model on a worker. Asleep, it gives up the memory of its weights and nothing else. It is woken
when somebody waits for its model and there is room; others are put to sleep to make room. So that the time
does not go into loading, what was loaded stays for its *residency*, a multiple of the time that loading took:
for all of it where the model is used, for half of it where it idles.

Who waits is served in the order of coming: room that comes free is kept for the first, so that a large model
is not overtaken for ever by small ones, and models that are all busy take turns.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum


class Stage(Enum):
    """How far a place is."""

    ASLEEP = "asleep"
    """No weights."""
    LOADING = "loading"
    """Weights on their way in."""
    READY = "ready"
    """Weights in memory."""
    LEAVING = "leaving"
    """On the way to sleep: weights in memory until what uses them has ended."""
    FIXED = "fixed"
    """Weights in memory, on their way in or out, on somebody else's order: not to be touched."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model, over all of its places."""

    requests: int = 0
    """That it serves, or where it is not READY, that wait for it."""
    last_used: float = 0.0
    """When the last request came or ended."""
    pinned: bool = False
    priority: int = 0
    keep_alive: float = 0.0
    """Seconds without a request after which it is put to sleep; 0: only to make room."""
    min_resident: int = 0


@dataclass(frozen=True, slots=True)
class PlaceView:
    """A model on a worker."""

    model: str
    worker: str
    stage: Stage
    weight_bytes: int
    load_seconds: float
    """That loading takes, measured or estimated."""
    since: float = 0.0
    """When it became READY."""


@dataclass(frozen=True, slots=True)
class View:
    """All that a decision depends on. Times are in seconds of one clock."""

    now: float
    models: Mapping[str, ModelView]
    places: Sequence[PlaceView]
    budgets: Mapping[str, float]
    """Bytes that weights may take, by worker; of those that are there. Other places are left alone."""


@dataclass(frozen=True, slots=True)
class Wake:
    """Load the weights; there is room for them."""

    model: str
    worker: str


@dataclass(frozen=True, slots=True)
class Sleep:
    """Take no new requests, and unload the weights once no sequence needs them."""

    model: str
    worker: str


@dataclass(frozen=True, slots=True)
class Rules:
    """How long what was loaded stays."""

    least: float = 4.0
    """Seconds of the shortest residency."""
    factor: float = 10.0
    """Residency as a multiple of the time that loading takes."""
    most: float = 300.0
    """Seconds of the longest residency."""

    def residency(self, place: PlaceView) -> float:
        """Seconds that a model in use stays loaded."""
        return max(self.least, min(self.most, self.factor * place.load_seconds))

    def gives_way(self, place: PlaceView, model: ModelView) -> float:
        """From when on a READY place may make room, if its model is used no more than now."""
        whole = self.residency(place)
        if model.requests:
            return place.since + whole
        return min(place.since + whole, max(place.since, model.last_used) + whole / 2)


@dataclass(slots=True)
class _Worker:
    """A worker's weights, less what the decisions so far claim."""

    budget: float
    places: list[PlaceView] = field(default_factory=list)
    free: float = 0.0
    coming: float = 0.0
    """Bytes of places that leave."""
    unmovable: float = 0.0
    """Bytes that no one who waits will ever get."""

    def claim(self, size: float) -> None:
        """Keep room for one who waits: what is free first, then what is to come."""
        taken = min(size, self.free)
        self.free -= taken
        self.coming = max(0.0, self.coming - (size - taken))


class Residency:
    """Decides. Remembers since when each model waits, and nothing else."""

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        self._waiting: dict[str, float] = {}

    def decide(self, view: View) -> list[Wake | Sleep]:
        """What to do now. Once this is under way, the next view has to show it."""
        return _Round(self.rules, view, self._queue(view)).decide()

    def room_at(self, view: View) -> dict[tuple[str, str], float]:
        """When there will be room for each (model, worker) that sleeps or leaves, if it were asked for now:
        `view.now` where there is room, infinity where what is pinned leaves too little."""
        waiting, times = self._queue(view), {}
        for name, worker in _workers(view).items():
            asleep = [place for place in worker.places if place.stage in (Stage.ASLEEP, Stage.LEAVING)]
            first = sorted(
                (place for place in asleep if place.model in waiting), key=lambda p: waiting.index(p.model)
            )
            for place in asleep:
                ahead = first[: first.index(place)] if place in first else first
                times[place.model, name] = self._room_at(view, worker, [*ahead, place])
        return times

    def _queue(self, view: View) -> list[str]:
        """Models that have to be woken, first come first."""
        resident = _resident(view)
        waiting = {name for name, model in view.models.items() if _missing(model, resident[name])}
        self._waiting = {name: self._waiting.get(name, view.now) for name in waiting}
        return sorted(waiting, key=lambda name: (self._waiting[name], -view.models[name].priority, name))

    def _room_at(self, view: View, worker: _Worker, queue: Sequence[PlaceView]) -> float:
        """When the last of `queue` gets its room, if each is woken in its turn and then stays."""
        resident = _resident(view)
        leaving: list[tuple[float, int]] = []
        for place in worker.places:
            if _protected(view.models[place.model], resident[place.model]):
                continue
            if place.stage is Stage.READY:
                leaving.append((self.rules.gives_way(place, view.models[place.model]), place.weight_bytes))
            elif place.stage in (Stage.LOADING, Stage.FIXED):
                stays = place.load_seconds + self.rules.residency(place)
                leaving.append((view.now + stays, place.weight_bytes))
        heapq.heapify(leaving)
        time, room = view.now, worker.free + worker.coming
        for place in queue:
            while room < place.weight_bytes:
                if not leaving:
                    return float("inf")
                when, size = heapq.heappop(leaving)
                time, room = max(time, when), room + size
            room -= place.weight_bytes
            stays = place.load_seconds + self.rules.residency(place)
            heapq.heappush(leaving, (time + stays, place.weight_bytes))
        return time


class _Round:
    """One decision in the making."""

    def __init__(self, rules: Rules, view: View, queue: Sequence[str]) -> None:
        self._rules = rules
        self._view = view
        self._queue = queue
        self._workers = _workers(view)
        self._resident = _resident(view)
        self._going: set[tuple[str, str]] = set()
        """Places that are put to sleep."""

    def decide(self) -> list[Wake | Sleep]:
        decided: list[Wake | Sleep] = []
        for name in self._queue:
            model = self._view.models[name]
            asleep = {w: p for w, worker in self._workers.items() for p in worker.places if _sleeps(p, name)}
            while asleep and _missing(model, self._resident[name]):
                place = asleep.pop(self._best(asleep))
                decided += self._make_room(place)
        return [*decided, *self._retired()]

    def _best(self, asleep: Mapping[str, PlaceView]) -> str:
        """The worker on which the model is woken with the least loss."""

        def loss(worker: str) -> tuple[bool, int, str]:
            victims = self._victims(asleep[worker])
            return victims is None, sum(v.weight_bytes for v in victims or ()), worker

        return min(asleep, key=loss)

    def _make_room(self, place: PlaceView) -> list[Wake | Sleep]:
        """Wake `place`, or what comes before that."""
        worker = self._workers[place.worker]
        if place.weight_bytes > worker.budget - worker.unmovable:
            return []
        victims = self._victims(place)
        decided: list[Wake | Sleep] = []
        for victim in victims or ():
            self._put_to_sleep(victim)
            decided.append(Sleep(victim.model, victim.worker))
        if place.weight_bytes <= worker.free:
            decided.append(Wake(place.model, place.worker))
        # Where even that is not enough, all there is stays free for it.
        worker.claim(place.weight_bytes)
        self._resident[place.model] += 1
        return decided

    def _victims(self, place: PlaceView) -> list[PlaceView] | None:
        """Whom to put to sleep to make room for `place`; None: there is too little that gives way now."""
        worker = self._workers[place.worker]
        needed = place.weight_bytes - worker.free - worker.coming
        chosen: list[PlaceView] = []
        for victim in sorted(filter(self._gives_way, worker.places), key=self._worth):
            if needed <= 0:
                break
            chosen.append(victim)
            needed -= victim.weight_bytes
        if needed > 0:
            return None
        # Small ones may have been chosen before a large one that is enough.
        for victim in reversed(chosen[:-1]):
            if needed + victim.weight_bytes <= 0:
                chosen.remove(victim)
                needed += victim.weight_bytes
        return chosen

    def _gives_way(self, place: PlaceView) -> bool:
        model = self._view.models[place.model]
        return self._may_sleep(place) and self._rules.gives_way(place, model) <= self._view.now

    def _may_sleep(self, place: PlaceView) -> bool:
        model = self._view.models[place.model]
        ready = place.stage is Stage.READY and (place.model, place.worker) not in self._going
        return ready and not _protected(model, self._resident[place.model])

    def _worth(self, place: PlaceView) -> tuple[bool, int, float, str]:
        """Least first: idle ones, by priority and the time that they idle; then busy ones in their turn."""
        model = self._view.models[place.model]
        busy = model.requests > 0
        return busy, model.priority, place.since if busy else model.last_used, place.model

    def _put_to_sleep(self, place: PlaceView) -> None:
        self._going.add((place.model, place.worker))
        self._resident[place.model] -= 1
        self._workers[place.worker].coming += place.weight_bytes

    def _retired(self) -> list[Sleep]:
        """Places that nobody has used for the time that their model is kept alive."""
        retired = []
        for place in (place for worker in self._workers.values() for place in worker.places):
            model = self._view.models[place.model]
            least = max(model.keep_alive, self._rules.residency(place) / 2)
            idle = self._view.now - max(model.last_used, place.since)
            if model.keep_alive and not model.requests and idle >= least and self._may_sleep(place):
                self._put_to_sleep(place)
                retired.append(Sleep(place.model, place.worker))
        return retired


def _workers(view: View) -> dict[str, _Worker]:
    resident = _resident(view)
    workers = {name: _Worker(budget, free=budget) for name, budget in view.budgets.items()}
    for place in view.places:
        if (worker := workers.get(place.worker)) is None:
            continue
        worker.places.append(place)
        if place.stage is not Stage.ASLEEP:
            worker.free -= place.weight_bytes
        if place.stage is Stage.LEAVING:
            worker.coming += place.weight_bytes
        fixed = place.stage is Stage.FIXED
        held = place.stage in (Stage.READY, Stage.LOADING)
        if fixed or (held and _protected(view.models[place.model], resident[place.model])):
            worker.unmovable += place.weight_bytes
    return workers


def _resident(view: View) -> Counter[str]:
    """Places with weights to stay, by model."""
    held = (Stage.READY, Stage.LOADING, Stage.FIXED)
    return Counter(place.model for place in view.places if place.stage in held)


def _missing(model: ModelView, resident: int) -> bool:
    """Whether one more place of the model has to be woken."""
    least = 1 if model.requests or model.pinned else 0
    return resident < max(least, model.min_resident)


def _protected(model: ModelView, resident: int) -> bool:
    """Whether each of the model's places has to stay as it is."""
    return model.pinned or resident <= model.min_resident


def _sleeps(place: PlaceView, model: str) -> bool:
    return place.model == model and place.stage is Stage.ASLEEP
