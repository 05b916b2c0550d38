"""`Placement`: which models live on which GPUs. A value, with `verify()`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from muxserve.placement.solver.cost import CostModel
from muxserve.placement.solver.workload import LONGEST, Node, Workload

MESH_SIZES = (1, 2, 4, 8)
BLOCK_BYTES = 16 * 1024
"""Bytes of a KV block."""


class InvalidPlacement(ValueError):
    """A placement that does not fit; `problems` says why not, all of it."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Placed:
    """A model in a unit. Its shares hold beside a job of the other kind; alone, a job has all of the mesh."""

    name: str
    model: str
    tensor_parallel: int
    """The size of the unit's mesh."""
    prefill_share: float = 0.5
    decode_share: float = 0.5


@dataclass(frozen=True, slots=True)
class Unit:
    """A mesh and the models on it."""

    gpus: tuple[tuple[int, int], ...]
    """(node, GPU of it)."""
    models: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """Units; a model in several of them has replicas."""

    units: tuple[Unit, ...]
    estimate: Mapping[str, Any] = field(default_factory=dict)
    """What whoever made it expects of it."""

    @property
    def gpus(self) -> int:
        """GPUs in use."""
        return sum(len(unit.gpus) for unit in self.units)

    def verify(self, workload: Workload, costs: CostModel) -> None:
        """InvalidPlacement: it cannot serve `workload`'s models on its cluster. A model without a place is
        no error: it is not served, and estimates say so."""
        if problems := list(_problems(self, workload, costs)):
            raise InvalidPlacement(problems)

    def as_object(self) -> dict[str, Any]:
        """As JSON holds it."""
        units = [
            {
                "gpus": [list(gpu) for gpu in unit.gpus],
                "models": [
                    {
                        "name": placed.name,
                        "model": placed.model,
                        "tensor_parallel": placed.tensor_parallel,
                        "prefill_share": placed.prefill_share,
                        "decode_share": placed.decode_share,
                    }
                    for placed in unit.models
                ],
            }
            for unit in self.units
        ]
        return {"units": units, "estimate": dict(self.estimate)}


def parse_placement(text: str) -> Placement:
    """From JSON. InvalidPlacement: it is none."""
    try:
        document = json.loads(text)
        units = tuple(
            Unit(
                tuple((int(node), int(gpu)) for node, gpu in unit["gpus"]),
                tuple(
                    Placed(
                        str(entry["name"]),
                        str(entry["model"]),
                        int(entry["tensor_parallel"]),
                        float(entry["prefill_share"]),
                        float(entry["decode_share"]),
                    )
                    for entry in unit["models"]
                ),
            )
            for unit in document["units"]
        )
        return Placement(units, dict(document.get("estimate", {})))
    except KeyError as error:
        raise InvalidPlacement([f"field {error.args[0]!r} is missing"]) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InvalidPlacement([f"not a placement: {error}"]) from error


def least_memory(nodes: Sequence[Node], gpus: Sequence[tuple[int, int]]) -> int:
    """Bytes that weights and KV may take on each GPU of a mesh: what its smallest one has."""
    return min(nodes[node].usable_bytes for node, _ in gpus)


def kv_room(usable: int, degree: int, weights: Sequence[int]) -> int:
    """Bytes of KV on `degree` GPUs together, beside `weights` (bytes of each model, all GPUs together).
    Negative: the weights do not fit."""
    return usable * degree - sum(weights)


def kv_needed(kv_bytes: Sequence[int]) -> int:
    """Least bytes of KV of a unit whose models take `kv_bytes` per token: each can serve its longest
    request, one after the other."""
    return LONGEST * max(kv_bytes, default=0)


def _problems(placement: Placement, workload: Workload, costs: CostModel) -> Iterator[str]:
    used = Counter(gpu for unit in placement.units for gpu in unit.gpus)
    for gpu, times in sorted(used.items()):
        node, number = gpu
        if not (0 <= node < len(workload.nodes) and 0 <= number < workload.nodes[node].gpus):
            yield f"there is no GPU {number} on node {node}"
        elif times > 1:
            yield f"GPU {number} of node {node} is in {times} units"
    spare = workload.gpus - len(used)
    if spare < workload.constraints.spare_gpus:
        yield f"{spare} GPUs are left unused, not {workload.constraints.spare_gpus}"
    for number, unit in enumerate(placement.units):
        known = all(0 <= node < len(workload.nodes) for node, _ in unit.gpus)
        for problem in _unit_problems(unit, workload, costs) if known else ():
            yield f"unit {number}: {problem}"


def _unit_problems(unit: Unit, workload: Workload, costs: CostModel) -> Iterator[str]:
    models = workload.by_name()
    if len(unit.gpus) not in MESH_SIZES:
        yield f"a mesh has 1, 2, 4 or 8 GPUs, not {len(unit.gpus)}"
        return
    if len({node for node, _ in unit.gpus}) > 1:
        yield "its GPUs are on several nodes"
    for placed in unit.models:
        yield from _model_problems(placed, unit, workload, costs)
    names = [placed.name for placed in unit.models]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{name} is there twice"
    present = [models[name] for name in dict.fromkeys(names) if name in models]
    usable = least_memory(workload.nodes, unit.gpus)
    room = kv_room(usable, len(unit.gpus), [m.shape.weight_bytes for m in present])
    need = kv_needed([m.shape.kv_bytes for m in present])
    if room < need:
        over = (need - room) / 2**30
        yield f"weights and the KV of one long request are {over:.1f} GiB more than its memory"
    together = set(names)
    for pair in workload.constraints.apart:
        if set(pair) <= together:
            yield f"{pair[0]} and {pair[1]} must be apart"


def _model_problems(placed: Placed, unit: Unit, workload: Workload, costs: CostModel) -> Iterator[str]:
    model = workload.by_name().get(placed.name)
    if model is None:
        yield f"the workload has no model {placed.name}"
        return
    if placed.model != model.model:
        yield f"{placed.name} is a {model.model}, not a {placed.model}"
    if placed.tensor_parallel != len(unit.gpus):
        yield f"{placed.name}: tensor parallel {placed.tensor_parallel} on {len(unit.gpus)} GPUs"
    elif placed.tensor_parallel not in costs.degrees(model.model, model.shape):
        yield f"{placed.name}: no costs are known for tensor parallel {placed.tensor_parallel}"
    for label, share in (("prefill", placed.prefill_share), ("decode", placed.decode_share)):
        if not 0 < share <= 1:
            yield f"{placed.name}: {label} share {share} is not in (0, 1]"
    pinned = workload.constraints.pin.get(placed.name)
    if pinned is not None and any(node not in pinned for node, _ in unit.gpus):
        yield f"{placed.name} is pinned to node {', '.join(map(str, pinned))}"


def disjoint(names: Sequence[str], workload: Workload) -> bool:
    """Whether no two of these models must be apart."""
    apart = {frozenset(pair) for pair in workload.constraints.apart}
    return not apart or not any(frozenset(pair) in apart for pair in combinations(names, 2))
