"""What jobs should take, from a device's ceilings and a model's shape, where nothing was measured.

A layer's work is the larger of what its arithmetic and its memory traffic allow, smoothed where the two are
near each other; a fixed time per layer (launches, and per reduction with tensor parallel) comes on top.
The constants of `A100` were fitted to measurements of four Llama models; `python -m benchmarks.placement`
reports the error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from muxserve.placement.solver.cost import CostModel, Service, TableCosts
from muxserve.placement.solver.shapes import ITEM, Shape

SHARES = tuple(tenth / 10 for tenth in range(3, 11))
DEGREES = (1, 2, 4, 8)
SMOOTH = 1.44
"""Exponent of the norm that joins compute and memory time: 1 adds them, infinity takes the larger one."""


@dataclass(frozen=True, slots=True)
class Device:
    """Ceilings of one GPU. Times in seconds."""

    flops: float
    """Dense 16-bit operations per second that large products reach."""
    bandwidth: float
    """Bytes per second that a copy reaches, reads and writes counted."""
    layer_overhead: float
    """Of a layer, whatever its size."""
    reduce_overhead: float
    """More of it, when a layer's two reductions go over several devices."""
    reduce_bandwidth: float
    """Bytes per second of activations through such a reduction."""
    saturation: float
    """How soon bandwidth is used up: a share s gets 1 - (1 - s) ** saturation of it."""
    token_overhead: float
    """Of a sequence in a decode step: sampling and what the host does."""


A100 = Device(
    flops=218e12,
    bandwidth=1.95e12,
    layer_overhead=0.182e-3,
    reduce_overhead=0.105e-3,
    reduce_bandwidth=53e9,
    saturation=4.8,
    token_overhead=13.6e-6,
)


@dataclass(frozen=True, slots=True)
class Roofline:
    """A `CostModel` for the models in `shapes`."""

    shapes: Mapping[str, Shape]
    device: Device = A100

    def degrees(self, model: str, shape: Shape) -> Sequence[int]:
        """See `CostModel`."""
        return [degree for degree in DEGREES if shape.splits(degree)]

    def shares(self, model: str, degree: int) -> Sequence[float]:
        """See `CostModel`."""
        return SHARES

    def prefill(self, model: str, degree: int, share: float, batch: float, length: float) -> float:
        """See `CostModel`."""
        shape, tokens = self.shapes[model], max(1.0, batch * length)
        attention = 2 * shape.layers * shape.heads * shape.head_dim * tokens * length
        flops = 2 * shape.layers * shape.layer_parameters * tokens + attention
        flops += 2 * shape.vocabulary * shape.hidden * batch
        moved = shape.active_parameters * ITEM + shape.kv_bytes * tokens
        return self._seconds(shape, degree, share, flops, moved, tokens)

    def decode(self, model: str, degree: int, share: float, batch: float, context: float) -> float:
        """See `CostModel`."""
        shape, batch = self.shapes[model], max(1.0, batch)
        flops = 2 * shape.active_parameters * batch
        moved = shape.active_parameters * ITEM + shape.kv_bytes * batch * context
        return self._seconds(shape, degree, share, flops, moved, batch) + self.device.token_overhead * batch

    def together(self, model: str, degree: int, share: float, batch: float, context: float) -> float:
        """See `CostModel`."""
        return self.decode(model, degree, share, batch, context)

    def _seconds(
        self, shape: Shape, degree: int, share: float, flops: float, moved: float, rows: float
    ) -> float:
        """`flops` and `moved` bytes of all devices together; `rows` of activations are reduced."""
        device = self.device
        compute = flops / degree / (device.flops * share)
        memory = moved / degree / (device.bandwidth * (1 - (1 - share) ** device.saturation))
        fixed = shape.layers * device.layer_overhead
        if degree > 1:
            fixed += shape.layers * device.reduce_overhead
            moved_rows = 2 * shape.layers * rows * shape.hidden * ITEM * (degree - 1) / degree
            compute += moved_rows / device.reduce_bandwidth
        return float((compute**SMOOTH + memory**SMOOTH) ** (1 / SMOOTH) + fixed)


@dataclass(frozen=True, slots=True)
class Costs:
    """Measured where a model is in the table, else predicted."""

    table: TableCosts
    measured: frozenset[str]
    predicted: Roofline = field(default_factory=lambda: Roofline({}))

    @property
    def service(self) -> Service:
        """What the deployment adds that the table was measured on."""
        return self.table.service

    def degrees(self, model: str, shape: Shape) -> Sequence[int]:
        """See `CostModel`."""
        return self._of(model).degrees(model, shape)

    def shares(self, model: str, degree: int) -> Sequence[float]:
        """See `CostModel`."""
        return self._of(model).shares(model, degree)

    def prefill(self, model: str, degree: int, share: float, batch: float, length: float) -> float:
        """See `CostModel`."""
        return self._of(model).prefill(model, degree, share, batch, length)

    def decode(self, model: str, degree: int, share: float, batch: float, context: float) -> float:
        """See `CostModel`."""
        return self._of(model).decode(model, degree, share, batch, context)

    def together(self, model: str, degree: int, share: float, batch: float, context: float) -> float:
        """See `CostModel`."""
        return self._of(model).together(model, degree, share, batch, context)

    def _of(self, model: str) -> CostModel:
        return self.table if model in self.measured else self.predicted
