"""Mesh groups: how a cluster may be cut into meshes, each way once, and back from meshes to GPUs.

Nodes that do not differ form a `Kind`; which node of a kind a mesh is on makes no difference, nor does the
order of meshes. Mesh sizes divide each other, so that meshes which fit at all fit when the largest are placed
first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from muxserve.placement.solver.placement import MESH_SIZES, Placed, Placement, Unit
from muxserve.placement.solver.workload import Workload


@dataclass(frozen=True, slots=True)
class Kind:
    """Nodes that are alike."""

    nodes: tuple[int, ...]
    gpus: int
    """Of each."""
    usable: int
    """Bytes of a GPU for weights and KV."""
    pinned: frozenset[str]
    """Of the models that are pinned somewhere, those that may be here."""

    @property
    def total(self) -> int:
        """GPUs of all of them."""
        return len(self.nodes) * self.gpus


@dataclass(frozen=True, slots=True)
class Mesh:
    """A mesh of some kind of node, not yet anywhere."""

    kind: int
    """Index among `kinds`."""
    size: int


Group = tuple[Mesh, ...]
"""Meshes that fit the cluster together."""


def kinds(workload: Workload) -> tuple[Kind, ...]:
    """The kinds of nodes, in the order of their first one."""
    found: dict[tuple[int, int, frozenset[str]], list[int]] = {}
    for number, node in enumerate(workload.nodes):
        pinned = frozenset(name for name, nodes in workload.constraints.pin.items() if number in nodes)
        found.setdefault((node.gpus, node.usable_bytes, pinned), []).append(number)
    return tuple(Kind(tuple(nodes), gpus, usable, pinned) for (gpus, usable, pinned), nodes in found.items())


def admits(kind: Kind, name: str, workload: Workload) -> bool:
    """Whether a model may be on nodes of this kind."""
    return name not in workload.constraints.pin or name in kind.pinned


Cut = tuple[tuple[int, int], ...]
"""((size, count), …) of the meshes of one kind, largest first."""


def cuts(all_kinds: Sequence[Kind], sizes: Sequence[int], most: int) -> Iterator[tuple[Cut, ...]]:
    """Every way to cut the cluster, once, a `Cut` for each kind, as long as meshes of one size and kind
    are at most `most`: more than there are models are of no use to an algorithm without replicas."""
    return product(*(list(_cuts(kind, sorted(sizes, reverse=True), most)) for kind in all_kinds))


def group(cut: Sequence[Cut]) -> Group:
    """The meshes of a cut."""
    return tuple(
        Mesh(k, size) for k, counts in enumerate(cut) for size, count in counts for _ in range(count)
    )


def _cuts(kind: Kind, sizes: Sequence[int], most: int) -> Iterator[Cut]:
    """((size, count), …), largest first, of one kind; the smallest size takes what is left."""
    if not sizes:
        yield ()
        return

    def extend(left: tuple[int, ...], rest: Sequence[int]) -> Iterator[Cut]:
        """`left`: free GPUs of each node."""
        size = rest[0]
        room = sum(free // size for free in left)
        if len(rest) == 1:
            yield ((size, min(most, room)),)
            return
        for count in range(min(most, room), -1, -1):
            taken = _take(left, size, count)
            for others in extend(taken, rest[1:]):
                yield ((size, count), *others)

    yield from extend((kind.gpus,) * len(kind.nodes), sizes)


def _take(left: tuple[int, ...], size: int, count: int) -> tuple[int, ...]:
    remaining = list(left)
    for node, free in enumerate(left):
        take = min(count, free // size)
        remaining[node] -= take * size
        count -= take
    return tuple(remaining)


def fits(kind: Kind, sizes: Iterable[int]) -> bool:
    """Whether meshes of these sizes fit nodes of this kind."""
    counts = Counter(sizes)
    left = (kind.gpus,) * len(kind.nodes)
    for size in sorted(counts, reverse=True):
        if counts[size] > sum(free // size for free in left):
            return False
        left = _take(left, size, counts[size])
    return True


def settle(units: Sequence[tuple[Mesh, Sequence[Placed]]], all_kinds: Sequence[Kind]) -> Placement:
    """Give meshes their GPUs, the largest first, and models the mesh's size as their tensor parallel. Meshes
    without models get none. ValueError: they do not fit."""
    free = {(k, node): list(range(kind.gpus)) for k, kind in enumerate(all_kinds) for node in kind.nodes}
    placed = []
    order = sorted((u for u in units if u[1]), key=lambda u: -u[0].size)
    for mesh, models in order:
        node = next(
            (n for n in all_kinds[mesh.kind].nodes if len(free[mesh.kind, n]) >= mesh.size),
            None,
        )
        if node is None:
            raise ValueError("the meshes do not fit the cluster")
        gpus, free[mesh.kind, node] = free[mesh.kind, node][: mesh.size], free[mesh.kind, node][mesh.size :]
        members = tuple(replace(model, tensor_parallel=mesh.size) for model in models)
        placed.append(Unit(tuple((node, gpu) for gpu in gpus), members))
    return Placement(tuple(sorted(placed, key=lambda unit: unit.gpus)))


def sizes_for(workload: Workload) -> tuple[int, ...]:
    """Mesh sizes that some node has room for."""
    largest = max(node.gpus for node in workload.nodes)
    return tuple(size for size in MESH_SIZES if size <= largest)
