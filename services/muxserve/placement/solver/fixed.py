"""Which models should be loaded on which machines, where machines are given: states, and what they are worth.

The estimator and the value of a request are those that `best` searches with; what is added is that a model
may be loaded nowhere and sleep until it is asked for, and that one which nobody asks for hardly counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muxserve.placement.solver.capacity import Estimator, Forecast, Load, Tolerance, value
from muxserve.placement.solver.objective import FAIRNESS, HUNGER, STARVED
from muxserve.placement.solver.workload import Model

Loaded = tuple[frozenset[int], ...]
"""Indexes of the models that each machine has loaded."""

ASLEEP = 0.25
"""What a request is worth whose model has to be loaded first."""
PARTS = 16
"""In which the requests of a model are divided among its replicas."""
FEWEST = 1
"""That each replica gets at least: units that are busy pull less than others, and not nothing."""
QUIET = 1e-3
"""Requests per second below which a model takes nothing from its neighbours."""
USUAL_BATCH = 8
"""Sequences that decode together where it is not known how many do."""
OBSERVED = Tolerance(0.95, 0.12, 10.0, 2.0)
"""Rates and speeds are observed, for a minute or two, and change: what is expected is right within a fifth. A
sharper judgement takes states for alike on either side of its edge, and for very unlike across it. Fitted to
the part of requests in time on two workers at ten loads (docs/placement.md)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """A mesh with an arena, and memory for weights beside it."""

    name: str
    weight_bytes: float
    """Bytes that weights may take; infinity: no limit."""
    kv_bytes: int
    estimator: Estimator


class FixedObjective:
    """Scores what is loaded where: requests per second that are served, and served in time."""

    def __init__(
        self,
        machines: Sequence[Machine],
        models: Sequence[Model],
        sizes: Sequence[Sequence[int | None]],
        horizon: float,
    ) -> None:
        """`sizes`: bytes of weights [model][machine]; None: that machine cannot have it. `horizon`: seconds
        that count; a model that will hardly be asked for within them counts little."""
        self.machines, self.models = machines, models
        self._sizes = sizes
        self._asked = [1 - math.exp(-m.rate * horizon) for m in models]
        self._usual = sum(m.rate for m in models) / max(1, len(models))
        self._alone = [self._fastest(i) for i in range(len(models))]
        self._busy = [[self._occupancy(i, k) for k in range(len(machines))] for i in range(len(models))]
        self._worths: dict[tuple[int, tuple[tuple[int, int], ...]], list[float]] = {}

    @property
    def perfect(self) -> float:
        """The score of serving everything as well as it can be."""
        return sum(m.rate for m in self.models) + self._usual * FAIRNESS * sum(self._asked)

    def can(self, model: int, machine: int) -> bool:
        """Whether the machine could have the model at all."""
        size = self._sizes[model][machine]
        return size is not None and size <= self.machines[machine].weight_bytes

    def fits(self, machine: int, models: frozenset[int]) -> bool:
        """Whether the machine may have all of these loaded together."""
        sizes = [self._sizes[i][machine] for i in models]
        taken = sum(size for size in sizes if size is not None)
        return None not in sizes and taken <= self.machines[machine].weight_bytes

    def worth(self, state: Loaded) -> list[float]:
        """Of a request of each model, 0 to 1."""
        worth = [0.0 if any(i in models for models in state) else ASLEEP for i in range(len(self.models))]
        for machine, members in enumerate(self._members(state)):
            for (i, parts), each in zip(members, self._on(machine, members), strict=True):
                worth[i] += each * parts / PARTS
        return worth

    def forecasts(self, state: Loaded) -> list[Forecast]:
        """Of each machine."""
        members = self._members(state)
        return [self._forecast(machine, each) for machine, each in enumerate(members)]

    def ratio(self, model: int, turn: float) -> float:
        """How many times as long as alone a mean request takes where a token takes a turn."""
        return self.models[model].output_tokens * turn / self._alone[model]

    def score(self, state: Loaded) -> float:
        """The larger the better; in requests per second."""
        worth = self.worth(state)
        rates = sum(m.rate * w for m, w in zip(self.models, worth, strict=True))
        fair = sum(asked * w for asked, w in zip(self._asked, worth, strict=True))
        hungry = sum(a * max(0.0, 1 - w / STARVED) for a, w in zip(self._asked, worth, strict=True))
        return rates + self._usual * (FAIRNESS * fair - HUNGER * hungry)

    def _members(self, state: Loaded) -> list[tuple[tuple[int, int], ...]]:
        """Of each machine: (model, parts of its requests)."""
        shares = self._shares(state)
        return [tuple((i, shares[i, k]) for i in sorted(models)) for k, models in enumerate(state)]

    def _shares(self, state: Loaded) -> dict[tuple[int, int], int]:
        """By (model, machine): the parts of a model's requests, of `PARTS`, that come there. Units pull what
        they have room for, so that replicas even out how busy machines are."""
        hosts = {i: [k for k, models in enumerate(state) if i in models] for i in range(len(self.models))}
        shares = {(i, k): PARTS // len(at) for i, at in hosts.items() for k in at}
        replicated = [i for i, at in hosts.items() if len(at) > 1]
        busy = [
            sum(shares[i, k] / PARTS * self._busy[i][k] for i in models) for k, models in enumerate(state)
        ]
        for i in (*replicated, *replicated) if len(replicated) > 1 else replicated:
            others = {k: busy[k] - shares[i, k] / PARTS * self._busy[i][k] for k in hosts[i]}
            for k, parts in self._fill(i, others).items():
                shares[i, k] = parts
                busy[k] = others[k] + parts / PARTS * self._busy[i][k]
        return shares

    def _fill(self, model: int, others: Mapping[int, float]) -> dict[int, int]:
        """The parts of a model by machine, each given to the one that is least busy with it; `others`: how
        busy they are without it."""
        parts = dict.fromkeys(others, min(FEWEST, PARTS // len(others)))
        for _ in range(PARTS - sum(parts.values())):
            k = min(others, key=lambda k: others[k] + (parts[k] + 1) / PARTS * self._busy[model][k])
            parts[k] += 1
        return parts

    def _occupancy(self, model: int, machine: int) -> float:
        """Part of its time, about, that a machine needs for all requests of a model."""
        if not self.can(model, machine):
            return 0.0
        found = self.models[model]
        curve = self.machines[machine].estimator.curve(found, 1, 1.0)
        return found.rate * (curve.prefill + found.output_tokens * curve.step(USUAL_BATCH) / USUAL_BATCH)

    def _on(self, machine: int, members: tuple[tuple[int, int], ...]) -> list[float]:
        """Worth of a request of each (model, parts of its requests) on a machine with just these."""
        key = (machine, members)
        if (known := self._worths.get(key)) is None:
            forecast = self._forecast(machine, members)
            known = self._worths[key] = [
                value(forecast.headroom, self.ratio(i, forecast.turn), OBSERVED) for i, _ in members
            ]
        return known

    def _forecast(self, machine: int, members: tuple[tuple[int, int], ...]) -> Forecast:
        rates = [(self.models[i], self.models[i].rate * parts / PARTS) for i, parts in members]
        # Those that nobody asks for are in nobody's way.
        loads = [Load(model, rate) for model, rate in rates if rate > QUIET]
        where = self.machines[machine]
        return where.estimator.forecast_within(loads, 1, where.kv_bytes)

    def _fastest(self, model: int) -> float:
        """Seconds of a mean request alone on the machine that is fastest with it."""
        found = self.models[model]
        times = []
        for machine, where in enumerate(self.machines):
            if self.can(model, machine):
                curve = where.estimator.curve(found, 1, 1.0)
                prefill, step = curve.prefill, curve.step(1)
                times.append(prefill + found.output_tokens * step)
        return min(times, default=1.0)
