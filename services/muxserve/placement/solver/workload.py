"""`Workload`: the cluster, the models that it is to serve, and how often each is asked for.

    cluster: {nnodes: 4, ngpus_per_node: 8}
    models: [{name: llm-1, model: llama-13b, rate: 19.5}, ...]
    avg_prompt_len: 100
    avg_output_len: 261

That is all that is needed. Beyond it: `cluster` may give `nodes: [{gpus: 8, memory_gib: 80}, ...]` or a
`memory_gib` for all nodes; a model may have `avg_prompt_len`, `avg_output_len` and a `shape` of its own;
`constraints` are described at `Constraints`. Lengths are in tokens, rates in requests per second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from muxserve.placement.solver.shapes import GIB, SHAPES, Shape

MEMORY_GIB = 80.0
USABLE = 0.9
"""Part of a device's memory for weights and KV. The rest is for activations, contexts, and the runtime."""
LONGEST = 2048
"""Tokens of the longest request that a unit must have blocks for."""


class WorkloadError(ValueError):
    """A workload that cannot be read; the message begins with the field."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine."""

    gpus: int
    memory_bytes: int = int(MEMORY_GIB * GIB)
    """Of one of its GPUs."""

    @property
    def usable_bytes(self) -> int:
        """What weights and KV may take of one GPU."""
        return int(self.memory_bytes * USABLE)


@dataclass(frozen=True, slots=True)
class Model:
    """A served model."""

    name: str
    model: str
    """What it is: a name of the cost table or of `SHAPES`. Two models may be the same checkpoint."""
    rate: float
    """Requests per second."""
    prompt_tokens: float
    """Mean."""
    output_tokens: float
    """Mean."""
    shape: Shape


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a placement must respect."""

    pin: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Model to nodes: it may be there and nowhere else."""
    apart: tuple[tuple[str, str], ...] = ()
    """Models that must not share a unit."""
    spare_gpus: int = 0
    """GPUs to leave unused."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Immutable; `scaled` gives another."""

    nodes: tuple[Node, ...]
    models: tuple[Model, ...]
    constraints: Constraints = field(default_factory=Constraints)

    @property
    def gpus(self) -> int:
        """Of all nodes."""
        return sum(node.gpus for node in self.nodes)

    @property
    def rate(self) -> float:
        """Requests per second of all models."""
        return sum(model.rate for model in self.models)

    def by_name(self) -> dict[str, Model]:
        """Models by their names."""
        return {model.name: model for model in self.models}


def read_workload(path: Path) -> Workload:
    """Read a YAML file. WorkloadError: what is wrong with it, naming the field."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"{path}: {error}") from error
    except yaml.YAMLError as error:
        raise WorkloadError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return parse_workload(document)


def parse_workload(document: Any) -> Workload:
    """A workload from what its YAML holds. WorkloadError: what is wrong, naming the field."""
    known = {"cluster", "models", "avg_prompt_len", "avg_output_len", "constraints"}
    _check(document, "workload", known)
    nodes = _nodes(document.get("cluster"))
    prompt = _number(document, "avg_prompt_len", "", least=1, default=None)
    output = _number(document, "avg_output_len", "", least=1, default=None)
    entries = document.get("models")
    if not isinstance(entries, list) or not entries:
        raise WorkloadError("models: must be a list that is not empty")
    models = tuple(_model(entry, f"models[{i}].", prompt, output) for i, entry in enumerate(entries))
    names = [model.name for model in models]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise WorkloadError(f'models[{i}].name: "{name}" is there twice')
    return Workload(nodes, models, _constraints(document.get("constraints"), names, nodes))


def _nodes(cluster: Any) -> tuple[Node, ...]:
    _check(cluster, "cluster", {"nnodes", "ngpus_per_node", "memory_gib", "nodes"})
    usual = _number(cluster, "memory_gib", "cluster.", least=0.001, default=MEMORY_GIB)
    if "nodes" not in cluster:
        count = _count(cluster, "nnodes", "cluster.")
        gpus = _count(cluster, "ngpus_per_node", "cluster.")
        return (Node(gpus, int(usual * GIB)),) * count
    entries = cluster["nodes"]
    if not isinstance(entries, list) or not entries:
        raise WorkloadError("cluster.nodes: must be a list that is not empty")
    nodes = []
    for i, entry in enumerate(entries):
        where = f"cluster.nodes[{i}]"
        _check(entry, where, {"gpus", "memory_gib"})
        memory = _number(entry, "memory_gib", f"{where}.", least=0.001, default=usual)
        nodes.append(Node(_count(entry, "gpus", f"{where}."), int(memory * GIB)))
    return tuple(nodes)


def _model(entry: Any, where: str, prompt: float | None, output: float | None) -> Model:
    _check(entry, where[:-1], {"name", "model", "rate", "avg_prompt_len", "avg_output_len", "shape"})
    for key in ("name", "model"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise WorkloadError(f"{where}{key}: must be a string that is not empty")
    kind = entry["model"]
    if "shape" in entry:
        shape = _shape(entry["shape"], f"{where}shape")
    elif kind in SHAPES:
        shape = SHAPES[kind]
    else:
        raise WorkloadError(f'{where}model: the shape of "{kind}" is not known; give it as {where}shape')
    return Model(
        entry["name"],
        kind,
        _number(entry, "rate", where, least=0),
        _number(entry, "avg_prompt_len", where, least=1, default=prompt),
        _number(entry, "avg_output_len", where, least=1, default=output),
        shape,
    )


def _shape(entry: Any, where: str) -> Shape:
    names = [f.name for f in fields(Shape)]
    _check(entry, where, set(names))
    counts = {name: _count(entry, name, f"{where}.") for name in names if name != "tied"}
    return Shape(**counts, tied=bool(entry.get("tied", False)))


def _constraints(entry: Any, names: Sequence[str], nodes: Sequence[Node]) -> Constraints:
    if entry is None:
        return Constraints()
    _check(entry, "constraints", {"pin", "apart", "spare_gpus"})
    pin, apart = entry.get("pin") or {}, entry.get("apart") or []
    if not isinstance(pin, dict) or not isinstance(apart, list):
        raise WorkloadError("constraints: pin is a mapping of models to nodes, apart a list of pairs")
    pinned = {}
    for name, where in pin.items():
        wanted = where if isinstance(where, list) else [where]
        if name not in names:
            raise WorkloadError(f'constraints.pin: no model named "{name}"')
        if not wanted or not all(isinstance(n, int) and 0 <= n < len(nodes) for n in wanted):
            raise WorkloadError(f"constraints.pin.{name}: must be numbers of nodes, 0 to {len(nodes) - 1}")
        pinned[name] = tuple(wanted)
    pairs = []
    for i, pair in enumerate(apart):
        if not isinstance(pair, list) or len(pair) != 2 or not all(name in names for name in pair):
            raise WorkloadError(f"constraints.apart[{i}]: must be two names of models")
        pairs.append((pair[0], pair[1]))
    spare = _count(entry, "spare_gpus", "constraints.", least=0) if "spare_gpus" in entry else 0
    return Constraints(pinned, tuple(pairs), spare)


def _check(entry: Any, where: str, known: set[str]) -> None:
    if not isinstance(entry, dict):
        raise WorkloadError(f"{where}: must be a mapping")
    for key in entry:
        if key not in known:
            raise WorkloadError(f"{where}: unknown field {key!r}; known are {', '.join(sorted(known))}")


def _number(entry: Mapping[str, Any], key: str, where: str, *, least: float, default: Any = ...) -> Any:
    """The number at `key`. `default` ...: there must be one."""
    value = entry.get(key, default)
    if value is None and default is None and key not in entry and where == "":
        return None
    if value is ... or value is None:
        raise WorkloadError(f"{where}{key}: is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < 1e18:
        raise WorkloadError(f"{where}{key}: must be a number of at least {least}, not {value!r}")
    return float(value)


def _count(entry: Mapping[str, Any], key: str, where: str, least: int = 1) -> int:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise WorkloadError(f"{where}{key}: must be a whole number of at least {least}, not {value!r}")
    return value
