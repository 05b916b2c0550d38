"""What is measured, and how thoroughly."""

from __future__ import annotations

from dataclasses import dataclass, field

from muxserve.bench.workload import Lengths, Mix, Stream, popularity

POLICIES = ("mux", "spatial", "temporal", "adbs", "fcfs", "round_robin")
"""Of our engine; the first is what the others are compared with."""

MODELS = ("m0", "m1", "m2", "m3")
"""Most popular first."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Times are seconds."""

    alphas: tuple[float, ...]
    policies: tuple[str, ...] = POLICIES
    searched: tuple[str, ...] = POLICIES
    """Those whose goodput is looked for."""
    loads: tuple[float, ...] = (0.5, 0.8, 1.2)
    """At which everybody is measured beside everybody, in parts of our saturated throughput."""
    scale: float = 0.1
    """Of ShareGPT's lengths: two cores are no A100."""
    context: int = 1024
    vocabulary: int = 1000
    """Prompts' token ids are below it."""
    slo_scale: float = 8.0
    arena: int = 512 * 2**20
    """Bytes of KV in all: of our arena, and of all peers together."""
    saturation: float = 24.0
    rounds: int = 3
    """Of the saturated measurement, by turns: how fast the machine is changes between minutes."""
    probe: float = 30.0
    """Arrivals of one rate of a search."""
    cell: float = 20.0
    """Arrivals of a measurement at one of `loads`."""
    probes: int = 6
    """Of a search, at most."""
    resolution: float = 1.08
    repeats: int = 3
    """Of each lone request of the calibration."""
    seed: int = 7
    budget: float = float("inf")
    """After so long no probe is begun any more."""
    overload: float = 120.0
    light: float = 20.0
    """Of light load, before the overload and after it."""
    tenants: float = 60.0
    cases: float = 30.0

    @property
    def lengths(self) -> Lengths:
        """Of prompts and outputs."""
        return Lengths(context=self.context).scaled(self.scale)

    def mix(self, alpha: float) -> Mix:
        """Traffic of all models, as skewed as that."""
        shares = popularity(MODELS, alpha)
        streams = tuple(Stream(model, share, self.lengths) for model, share in shares.items())
        return Mix(streams, vocabulary=self.vocabulary)


QUICK = Plan(
    alphas=(1.3,),
    searched=("mux", "spatial", "temporal"),
    loads=(0.8,),
    saturation=12.0,
    rounds=2,
    probe=12.0,
    cell=40.0,
    probes=7,
    resolution=1.1,
    repeats=3,
    budget=410.0,
)
"""Ends within eight minutes, peers' start included."""

FULL = Plan(alphas=(0.7, 1.3, 2.1))


@dataclass(frozen=True, slots=True)
class Case:
    """Two of the paper's comparisons of ADBS with FCFS and round-robin (figure 9), with one model's shape."""

    name: str
    rates: tuple[float, ...]
    lengths: tuple[float, ...]
    """Relative, of outputs."""
    arena: int = 48 * 2**20
    """Little enough that memory is what is fought over."""
    policies: tuple[str, ...] = field(default=("mux", "adbs", "round_robin", "fcfs"))

    def mix(self, plan: Plan) -> Mix:
        """Traffic of as many models as there are rates."""
        base = plan.lengths
        streams = tuple(
            Stream(model, rate, base.scaled(1.0, length))
            for model, rate, length in zip(MODELS, self.rates, self.lengths, strict=False)
        )
        return Mix(streams, vocabulary=plan.vocabulary)


CASES = (
    Case("lengths 2:1:1, rates 2:8:8", (2, 8, 8), (2, 1, 1)),
    Case("lengths 4:1, rates 1:8", (1, 8), (4, 1)),
)
