"""Algorithms 1 and 2 of the MuxServe paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.equations import Member, throughput
from muxserve.placement.solver.meshes import Group, Kind, Mesh, admits, cuts, group, kinds, settle, sizes_for
from muxserve.placement.solver.placement import Placed, Placement, disjoint
from muxserve.placement.solver.workload import Model, Workload

MOST_GROUPS = 2000
"""Mesh groups that are looked at; of more, as many evenly spaced ones."""
MOST_TRIALS = 1_000_000
"""Bound on groups times models squared, which time grows with: with many models fewer groups are tried."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run a model: so many GPUs, and that share of their SMs."""

    degree: int
    share: float


def candidates(model: Model, sizes: Sequence[int], usable: int, costs: CostModel) -> list[Candidate]:
    """Algorithm 2: for each tensor-parallel degree the fewest SMs that serve the model's rate.

    Degrees with which no share does are left out; if that leaves none, each that the model fits is a
    candidate with all SMs: the paper does not say what becomes of a model that is too popular for one mesh.
    """
    found, fitting = [], []
    for degree in costs.degrees(model.model, model.shape):
        if degree not in sizes:
            continue
        for share in costs.shares(model.model, degree):
            served = throughput([Member(model, model.rate, share)], degree, usable, costs)
            if served is not None and share == costs.shares(model.model, degree)[-1]:
                fitting.append(Candidate(degree, share))
            if served is not None and served[0] >= model.rate * (1 - 1e-9):
                found.append(Candidate(degree, share))
                break
    return found or fitting


def computation(model: Model) -> float:
    """What models are sorted by: scale × popularity."""
    return model.shape.parameters * model.rate * (model.prompt_tokens + model.output_tokens)


@dataclass(slots=True)
class _Filling:
    """A mesh while models are put on it."""

    mesh: Mesh
    members: tuple[Member, ...] = ()
    served: float = 0.0


class _Filler:
    """Puts models on the meshes of a group, and remembers Equation 2 of the sets that it has met."""

    def __init__(self, workload: Workload, costs: CostModel, all_kinds: Sequence[Kind]) -> None:
        self._workload, self._costs, self._kinds = workload, costs, all_kinds
        self._known: dict[tuple[int, int, tuple[Member, ...]], float | None] = {}
        self._candidates: dict[tuple[str, int], list[Candidate]] = {}

    def fill(self, group: Group, models: Sequence[Model]) -> tuple[float, list[_Filling]]:
        """Σ F, and what is on the meshes."""
        meshes = [_Filling(mesh) for mesh in group]
        for model in models:
            best: tuple[float, _Filling, Member] | None = None
            seen = set()
            for filling in meshes:
                if (alike := (filling.mesh, filling.members)) in seen:
                    continue
                seen.add(alike)
                for candidate in self._candidates_of(model, self._kinds[filling.mesh.kind].usable):
                    if candidate.degree != filling.mesh.size:
                        continue
                    member = Member(model, model.rate, candidate.share)
                    after = self._throughput(filling.mesh, (*filling.members, member))
                    if after is not None and (best is None or after - filling.served > best[0]):
                        best = (after - filling.served, filling, member)
            if best is not None:
                gain, filling, member = best
                filling.members += (member,)
                filling.served += gain
        return sum(filling.served for filling in meshes), meshes

    def _candidates_of(self, model: Model, usable: int) -> list[Candidate]:
        key = (model.name, usable)
        if key not in self._candidates:
            self._candidates[key] = candidates(model, sizes_for(self._workload), usable, self._costs)
        return self._candidates[key]

    def _throughput(self, mesh: Mesh, members: tuple[Member, ...]) -> float | None:
        kind = self._kinds[mesh.kind]
        key = (mesh.size, mesh.kind, members)
        if key not in self._known:
            names = [member.model.name for member in members]
            served = None
            if admits(kind, names[-1], self._workload) and disjoint(names, self._workload):
                served = throughput(members, mesh.size, kind.usable, self._costs)
            self._known[key] = None if served is None else sum(served)
        return self._known[key]


def paper(workload: Workload, costs: CostModel) -> Placement:
    """What Algorithm 1 leads to."""
    _, units = algorithm_1(workload, costs)
    return settle([(mesh, _placed(members)) for mesh, members in units], kinds(workload))


def algorithm_1(workload: Workload, costs: CostModel) -> tuple[float, list[tuple[Mesh, tuple[Member, ...]]]]:
    """For each mesh group, put models, most computation first, where F gains most; the group with the largest
    Σ F is kept. Returns that, and the models of each mesh."""
    all_kinds = kinds(workload)
    filler = _Filler(workload, costs, all_kinds)
    models = sorted(workload.models, key=computation, reverse=True)
    every = list(cuts(all_kinds, sizes_for(workload), len(models)))
    most = max(20, min(MOST_GROUPS, MOST_TRIALS // len(models) ** 2))
    best: tuple[float, list[_Filling]] = (-1.0, [])
    for cut in every[:: max(1, -(-len(every) // most))]:
        served, meshes = filler.fill(_spared(group(cut), workload), models)
        if served > best[0]:
            best = (served, meshes)
    return best[0], [(filling.mesh, filling.members) for filling in best[1]]


def _spared(group: Group, workload: Workload) -> Group:
    """The group without its last meshes, so that the GPUs that are to be spared are."""
    over = sum(mesh.size for mesh in group) - (workload.gpus - workload.constraints.spare_gpus)
    left = list(group)
    while over > 0 and left:
        over -= left.pop().size
    return tuple(left)


def _placed(members: Sequence[Member]) -> list[Placed]:
    """Decode jobs get the largest share of the members' candidates, prefill jobs what that leaves."""
    if not members:
        return []
    decode = min(0.7, max(member.share for member in members))
    return [
        Placed(m.model.name, m.model.model, 0, prefill_share=round(1 - decode, 2), decode_share=decode)
        for m in members
    ]
