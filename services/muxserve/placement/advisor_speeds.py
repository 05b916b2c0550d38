"""`Speeds`: how fast workers are, as their jobs' times say, beside what their ceilings do."""

from __future__ import annotations

from dataclasses import dataclass

from muxserve.placement.solver.machines import Footprint, MachineCosts, ceilings
from muxserve.v1 import scheduler_pb2

REMEMBERED = 60.0
"""Seconds of the device that count about fully; older ones fade."""
ENOUGH = 0.5
"""Seconds of the device below which the ceilings are believed."""
CONTEXT = 128
"""Tokens of a sequence that decodes, about: KV is little of what is moved."""


@dataclass(slots=True)
class _Balance:
    """Seconds that jobs took and that they were predicted to take."""

    seen: float = 0.0
    predicted: float = 0.0

    def add(self, seen: float, predicted: float) -> None:
        kept = max(0.0, 1 - seen / REMEMBERED)
        self.seen = self.seen * kept + seen
        self.predicted = self.predicted * kept + predicted

    @property
    def factor(self) -> float:
        if self.seen < ENOUGH or self.predicted <= 0:
            return 1.0
        return min(10.0, max(0.1, self.seen / self.predicted))


class Speeds:
    """By worker, for each kind of job."""

    def __init__(self) -> None:
        self._prefill: dict[str, _Balance] = {}
        self._decode: dict[str, _Balance] = {}
        self._counted: dict[tuple[str, str, str], scheduler_pb2.UnitModelStatus] = {}

    def observe(
        self,
        worker: str,
        device: str,
        compute_units: int,
        footprint: Footprint,
        source: str,
        status: scheduler_pb2.UnitModelStatus,
    ) -> None:
        """What the scheduler `source` has counted of a model on `worker` since it began."""
        key = (worker, status.model, source)
        before = self._counted.get(key)
        self._counted[key] = status
        if before is None or status.decode_steps < before.decode_steps:
            before = scheduler_pb2.UnitModelStatus()
        costs = MachineCosts({status.model: footprint}, ceilings(device, compute_units))
        jobs = status.prefill_jobs - before.prefill_jobs
        if jobs > 0:
            tokens = max(1, status.prefill_job_tokens - before.prefill_job_tokens) / jobs
            predicted = jobs * costs.prefill(status.model, 1, 1.0, 1, tokens)
            seen = status.prefill_seconds - before.prefill_seconds
            self._prefill.setdefault(worker, _Balance()).add(seen, predicted)
        steps = status.decode_steps - before.decode_steps
        if steps > 0:
            batch = max(1.0, (status.decode_step_tokens - before.decode_step_tokens) / steps)
            predicted = steps * costs.decode(status.model, 1, 1.0, batch, CONTEXT)
            seen = status.decode_seconds - before.decode_seconds
            self._decode.setdefault(worker, _Balance()).add(seen, predicted)

    def factors(self, worker: str) -> tuple[float, float]:
        """How many times as long as predicted prefill and decode jobs take."""
        nothing = _Balance()
        return self._prefill.get(worker, nothing).factor, self._decode.get(worker, nothing).factor
