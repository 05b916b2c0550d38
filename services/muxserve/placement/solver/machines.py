"""Devices that are there already, one mesh each, and what jobs take on them: for placements that change.

A model is known by its footprint, as a worker states it. Times are a roofline of the device's ceilings,
corrected by what the device was seen to take.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from muxserve.placement.solver.roofline import A100, SMOOTH
from muxserve.placement.solver.shapes import ITEM, Shape


@dataclass(frozen=True, slots=True)
class Footprint(Shape):
    """A model of which no more is known than bytes and layers; what depends on more is 0."""

    weights: int = 0
    """Bytes."""
    kv: int = 0
    """Bytes of K and V of a token."""

    @classmethod
    def of(cls, weight_bytes: int, kv_bytes: int, layers: int) -> Footprint:
        """All in bytes but `layers`."""
        return cls(layers, 0, 0, 0, 0, 0, 0, weights=weight_bytes, kv=kv_bytes)

    @property
    def weight_bytes(self) -> int:
        """See `Shape`."""
        return self.weights

    @property
    def active_parameters(self) -> int:
        """See `Shape`. Nearly all weights: an embedding table beside the output matrix is taken for read."""
        return self.weights // ITEM

    @property
    def kv_bytes(self) -> int:
        """See `Shape`."""
        return self.kv


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a device reaches at most. Times in seconds."""

    flops: float
    """Operations per second."""
    bandwidth: float
    """Bytes per second."""
    layer_overhead: float
    saturation: float
    """See `roofline.Device`."""


_CORE_FLOPS, _CORE_BANDWIDTH, _CORES_BANDWIDTH = 90e9, 16e9, 120e9
_GPUS = {"H200": (700e12, 4.0e12), "H100": (700e12, 2.8e12), "A100": (A100.flops, A100.bandwidth)}


def ceilings(device: str, compute_units: int) -> Ceilings:
    """Of a device by the name that its worker gives it: "cpu", or a GPU's; other GPUs are taken for an A100.

    The figures only have to be about right: what was measured corrects them.
    """
    if device == "cpu":
        cores = max(1, compute_units)
        bandwidth = min(cores * _CORE_BANDWIDTH, _CORES_BANDWIDTH)
        # How many cores it takes to use the memory up.
        return Ceilings(cores * _CORE_FLOPS, bandwidth, 20e-6, max(1.0, cores * _CORE_BANDWIDTH / bandwidth))
    flops, bandwidth = next((found for name, found in _GPUS.items() if name in device), _GPUS["A100"])
    return Ceilings(flops, bandwidth, 60e-6, A100.saturation)


@dataclass(frozen=True, slots=True)
class MachineCosts:
    """A `CostModel` of one device for models by footprint; tensor parallel is 1."""

    footprints: Mapping[str, Footprint]
    device: Ceilings
    prefill_factor: float = 1.0
    decode_factor: float = 1.0
    """How many times as long as the ceilings say jobs were seen to take."""

    def degrees(self, model: str, shape: Shape) -> Sequence[int]:
        """See `CostModel`."""
        return (1,)

    def shares(self, model: str, degree: int) -> Sequence[float]:
        """See `CostModel`."""
        return (0.5, 1.0)

    def prefill(self, model: str, degree: int, share: float, batch: float, length: float) -> float:
        """See `CostModel`."""
        tokens = max(1.0, batch * length)
        return self.prefill_factor * self._seconds(self.footprints[model], share, tokens, tokens)

    def decode(self, model: str, degree: int, share: float, batch: float, context: float) -> float:
        """See `CostModel`."""
        batch = max(1.0, batch)
        return self.decode_factor * self._seconds(self.footprints[model], share, batch, batch * context)

    def together(self, model: str, degree: int, share: float, batch: float, context: float) -> float:
        """See `CostModel`."""
        return self.decode(model, degree, share, batch, context)

    def _seconds(self, model: Footprint, share: float, rows: float, kv_tokens: float) -> float:
        device = self.device
        compute = 2 * model.active_parameters * rows / (device.flops * share)
        moved = model.weight_bytes + model.kv_bytes * kv_tokens
        memory = moved / (device.bandwidth * (1 - (1 - share) ** device.saturation))
        joined: float = (compute**SMOOTH + memory**SMOOTH) ** (1 / SMOOTH)
        return joined + model.layers * device.layer_overhead
