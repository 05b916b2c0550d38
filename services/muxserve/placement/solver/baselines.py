"""What others would do: `greedy`, the paper's ablation, and `spatial`, GPUs of its own for every model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.equations import Member, throughput
from muxserve.placement.solver.meshes import Kind, Mesh, admits, kinds, settle, sizes_for
from muxserve.placement.solver.placement import Placed, Placement, disjoint, kv_needed, kv_room
from muxserve.placement.solver.workload import Model, Workload


def greedy(workload: Workload, costs: CostModel) -> Placement:
    """Meshes of one size, the smallest with which every model fits one; models by rate, each to the mesh with
    the most memory left."""
    all_kinds = kinds(workload)
    usable = max(kind.usable for kind in all_kinds)
    sizes = sizes_for(workload)
    least = [min(fits, default=None) for m in workload.models for fits in [_fitting(m, sizes, usable, costs)]]
    size = max((fit for fit in least if fit is not None), default=1)
    budget = workload.gpus - workload.constraints.spare_gpus
    meshes: list[tuple[Mesh, list[Model]]]
    meshes = [
        (Mesh(k, size), [])
        for k, kind in enumerate(all_kinds)
        for _ in range(len(kind.nodes) * (kind.gpus // size))
    ]
    del meshes[budget // size :]
    for model in sorted(workload.models, key=lambda m: -m.rate):
        options = [
            (room, i)
            for i, (mesh, present) in enumerate(meshes)
            if (room := _room(mesh, all_kinds[mesh.kind], [*present, model], workload, costs)) is not None
        ]
        if options:
            meshes[max(options, key=lambda option: (option[0], -option[1]))[1]][1].append(model)
    return settle([(mesh, [_half(m) for m in present]) for mesh, present in meshes], all_kinds)


@dataclass(slots=True)
class _Own:
    """A model's own meshes."""

    model: Model
    meshes: list[Mesh]
    served: float
    """By Equation 3."""

    @property
    def pressure(self) -> float:
        """Rate over what its GPUs serve."""
        return self.model.rate / self.served if self.served > 0 else float("inf")


def spatial(workload: Workload, costs: CostModel) -> Placement:
    """No model shares a GPU. Each first gets the smallest mesh that it fits, those that serve the most per
    GPU first; what is left goes to replicas of whichever model its GPUs serve worst, one after the other."""
    all_kinds = kinds(workload)
    free = [[kind.gpus] * len(kind.nodes) for kind in all_kinds]
    budget = workload.gpus - workload.constraints.spare_gpus

    def add(model: Model) -> Mesh | None:
        """The smallest mesh for one more replica, taken from `free`."""
        nonlocal budget
        for size in sizes_for(workload):
            for k, kind in enumerate(all_kinds):
                if size > budget or not admits(kind, model.name, workload):
                    continue
                if size not in _fitting(model, [size], kind.usable, costs):
                    continue
                # The node with the least room that suffices: larger meshes keep theirs.
                nodes = [n for n, left in enumerate(free[k]) if left >= size]
                if nodes:
                    free[k][min(nodes, key=lambda n: (free[k][n], n))] -= size
                    budget -= size
                    return Mesh(k, size)
        return None

    def serves(mesh: Mesh, model: Model) -> float:
        return sum(
            throughput([Member(model, 1e9, 1.0)], mesh.size, all_kinds[mesh.kind].usable, costs) or [0]
        )

    order = sorted(workload.models, key=lambda m: _density(m, all_kinds, workload, costs), reverse=True)
    owned = [_Own(model, [mesh], serves(mesh, model)) for model in order if (mesh := add(model)) is not None]
    growing = list(owned)
    while growing:
        worst = max(growing, key=lambda own: own.pressure)
        if (mesh := add(worst.model)) is None:
            growing.remove(worst)
        else:
            worst.meshes.append(mesh)
            worst.served += serves(mesh, worst.model)
    return settle([(mesh, [_half(own.model)]) for own in owned for mesh in own.meshes], all_kinds)


def _density(model: Model, all_kinds: Sequence[Kind], workload: Workload, costs: CostModel) -> float:
    """Requests per second and GPU of its smallest mesh."""
    usable = max(kind.usable for kind in all_kinds)
    sizes = _fitting(model, sizes_for(workload), usable, costs)
    if not sizes:
        return 0.0
    return sum(throughput([Member(model, model.rate, 1.0)], sizes[0], usable, costs) or [0]) / sizes[0]


def _fitting(model: Model, sizes: Sequence[int], usable: int, costs: CostModel) -> list[int]:
    """Degrees with which it fits a mesh of its own, ascending."""
    shape = model.shape
    return [
        degree
        for degree in costs.degrees(model.model, shape)
        if degree in sizes and kv_room(usable, degree, [shape.weight_bytes]) >= kv_needed([shape.kv_bytes])
    ]


def _room(
    mesh: Mesh, kind: Kind, models: Sequence[Model], workload: Workload, costs: CostModel
) -> int | None:
    """Bytes left on a mesh with these models, the last one new. None: they may not be there together."""
    new = models[-1]
    if mesh.size not in costs.degrees(new.model, new.shape) or not admits(kind, new.name, workload):
        return None
    if not disjoint([m.name for m in models], workload):
        return None
    room = kv_room(kind.usable, mesh.size, [m.shape.weight_bytes for m in models])
    return room if room >= kv_needed([m.shape.kv_bytes for m in models]) else None


def _half(model: Model) -> Placed:
    return Placed(model.name, model.model, 0)
