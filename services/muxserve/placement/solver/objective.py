"""`Objective`: what `best` maximises, over `State`s: meshes, and the models on each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from itertools import combinations

from muxserve.placement.solver.alone import alone
from muxserve.placement.solver.capacity import Estimator, Forecast, Load, value
from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.meshes import Kind, Mesh, admits, kinds, settle
from muxserve.placement.solver.placement import Placed, Placement
from muxserve.placement.solver.workload import Workload

State = tuple[tuple[Mesh, frozenset[int]], ...]
"""Meshes and the indexes of the models on them. Meshes without models are GPUs that are not used."""

SHARES = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Prefill shares that units choose from; decode jobs have the rest."""
FAIRNESS = 0.5
"""Weight of serving every model alike, beside that of serving many requests."""
STARVED = 0.6
"""A model that is worth less than this, of 1, to its users starves."""
HUNGER = 6.0
"""What that costs at worst, in rates of the mean model: more than serving any one of them gains. It is the
square of how far it is from enough that counts: where there is too little for all, it is spread."""
MILD_HUNGER = 1.0
"""The same where there is too little for all, and spreading it would cost more than it is worth."""
ABSENT = 1.0
"""What a model without a place costs, in rates of all models: serving the others does not make up for it."""
UNEVEN = 1.3
"""By what a token takes longer than a turn where models take turns: prompts that end cut turns short."""


class Objective:
    """Scores states: requests per second that are served, and served in time, and that of the mean model.

    A model's rate is divided equally among its replicas: units take from its queue in turns.
    """

    def __init__(self, workload: Workload, costs: CostModel) -> None:
        self.workload = workload
        self.hunger = HUNGER
        self.kinds = kinds(workload)
        self.models = workload.models
        self.estimator = Estimator(costs)
        self._degrees = [frozenset(costs.degrees(m.model, m.shape)) for m in self.models]
        index = {m.name: i for i, m in enumerate(self.models)}
        self._apart = {frozenset((index[a], index[b])) for a, b in workload.constraints.apart}
        self._usual = workload.rate / max(1, len(self.models))
        self._alone = [alone(m, workload, costs)(m.prompt_tokens, m.output_tokens) for m in self.models]
        self._forecasts: dict[tuple[int, int, tuple[tuple[int, int], ...]], Forecast] = {}
        self._worths: dict[tuple[int, int, tuple[tuple[int, int], ...]], list[float]] = {}

    def with_hunger(self, hunger: float) -> Objective:
        """The same but for what starving models cost. What is known of meshes is shared."""
        other = copy(self)
        other.hunger = hunger
        return other

    @property
    def budget(self) -> int:
        """GPUs that may be used."""
        return self.workload.gpus - self.workload.constraints.spare_gpus

    def allows(self, mesh: Mesh, models: Iterable[int]) -> bool:
        """Whether these models may and can be together on a mesh."""
        kind, present = self.kinds[mesh.kind], sorted(models)
        for i in present:
            if mesh.size not in self._degrees[i] or not admits(kind, self.models[i].name, self.workload):
                return False
        if self._apart and any(frozenset(pair) in self._apart for pair in combinations(present, 2)):
            return False
        # Rates do not matter for whether it fits.
        return not present or self.forecast(mesh, [(i, 1) for i in present]).headroom > 0

    def forecast(self, mesh: Mesh, members: Sequence[tuple[int, int]]) -> Forecast:
        """Of a mesh with these (model, its replicas in all), in order."""
        usable = self.kinds[mesh.kind].usable
        key = (mesh.size, usable, tuple(members))
        if key not in self._forecasts:
            loads = [Load(self.models[i], self.models[i].rate / replicas) for i, replicas in members]
            self._forecasts[key] = self.estimator.forecast(loads, mesh.size, usable)
        return self._forecasts[key]

    def score(self, state: State) -> float:
        """The larger the better. Minus infinity: too many GPUs."""
        replicas = Counter(i for _, models in state for i in models)
        worth = [0.0] * len(self.models)
        for mesh, models in state:
            if models:
                members = tuple((i, replicas[i]) for i in sorted(models))
                for (i, count), each in zip(members, self._worth(mesh, members), strict=True):
                    worth[i] += each / count
        if sum(mesh.size for mesh, models in state if models) > self.budget:
            return float("-inf")
        rates = sum(m.rate * w for m, w in zip(self.models, worth, strict=True))
        starving = sum(max(0.0, 1 - w / STARVED) ** 2 for w in worth)
        absent = (len(worth) - len(replicas)) * ABSENT * self.workload.rate
        return rates + self._usual * (FAIRNESS * sum(worth) - self.hunger * starving) - absent

    def _worth(self, mesh: Mesh, members: tuple[tuple[int, int], ...]) -> list[float]:
        """Of a request of each member."""
        key = (mesh.size, mesh.kind, members)
        if (known := self._worths.get(key)) is None:
            forecast = self.forecast(mesh, members)
            pace = forecast.turn * (UNEVEN if len(members) > 1 else 1.0)
            known = self._worths[key] = [
                value(forecast.headroom, self.models[i].output_tokens * pace / self._alone[i])
                for i, _ in members
            ]
        return known

    def placement(self, state: State) -> Placement:
        """With GPUs, and for each unit the shares that give it most headroom."""
        replicas = Counter(i for _, models in state for i in models)
        units = []
        for mesh, models in state:
            loads = [Load(self.models[i], self.models[i].rate / replicas[i]) for i in sorted(models)]
            prefill = self._share(mesh, loads, self.kinds[mesh.kind]) if loads else 0.5
            placed = [Placed(x.model.name, x.model.model, 0, prefill, round(1 - prefill, 2)) for x in loads]
            units.append((mesh, placed))
        return settle(units, self.kinds)

    def _share(self, mesh: Mesh, loads: Sequence[Load], kind: Kind) -> float:
        def rank(share: float) -> tuple[float, float]:
            forecast = self.estimator.forecast(loads, mesh.size, kind.usable, share, round(1 - share, 2))
            return forecast.headroom, -forecast.turn

        return max(sorted(SHARES, key=lambda share: abs(share - 0.5)), key=rank)


def as_state(placement: Placement, objective: Objective) -> State:
    """A placement as a state, with the GPUs that it leaves unused."""
    index = {m.name: i for i, m in enumerate(objective.models)}
    where = {node: k for k, kind in enumerate(objective.kinds) for node in kind.nodes}
    state = [
        (Mesh(where[unit.gpus[0][0]], len(unit.gpus)), frozenset(index[p.name] for p in unit.models))
        for unit in placement.units
    ]
    for k, kind in enumerate(objective.kinds):
        used = sum(mesh.size for mesh, _ in state if mesh.kind == k)
        state += [(Mesh(k, 1), frozenset())] * (kind.total - used)
    return tuple(state)
