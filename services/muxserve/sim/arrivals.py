"""What arrives at a simulated cluster: requests in the order of their times, from rates or from a trace.

Poisson arrivals at each model's rate; lengths are log-normal around its means, as those of conversations are.
Each model has a random stream of its own, keyed by seed and name: the same seed gives a model the same
requests whatever else is served.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from muxserve.placement.solver.workload import LONGEST, Model, Workload

SIGMA = 0.8
"""Standard deviation of the logarithm of a length."""


class TraceError(ValueError):
    """A trace that cannot be read; the message says in which line."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request to come."""

    time: float
    """Seconds from the start."""
    model: str
    prompt: int
    output: int
    """Tokens, at least 1 each."""


def poisson(workload: Workload, duration: float, seed: int, sigma: float = SIGMA) -> list[Arrival]:
    """Requests of `duration` seconds. `sigma` 0: all lengths are the means."""
    found = [arrival for model in workload.models for arrival in _of(model, duration, seed, sigma)]
    return sorted(found, key=lambda arrival: (arrival.time, arrival.model))


def read_trace(path: Path, workload: Workload) -> list[Arrival]:
    """Requests from a file of JSON lines: `{"time": s, "model": name, "prompt": tokens, "output": tokens}`.
    TraceError: a line is not that."""
    models = workload.by_name()
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            arrival = Arrival(
                float(entry["time"]), entry["model"], int(entry["prompt"]), int(entry["output"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise TraceError(f"{path}:{number}: {error!r}") from error
        if arrival.model not in models:
            raise TraceError(f'{path}:{number}: the workload has no model "{arrival.model}"')
        if arrival.time < 0 or min(arrival.prompt, arrival.output) < 1:
            raise TraceError(f"{path}:{number}: time must not be negative, lengths must be at least 1")
        if arrival.prompt + arrival.output > LONGEST:
            raise TraceError(f"{path}:{number}: prompt and output are more than {LONGEST} tokens")
        found.append(arrival)
    return sorted(found, key=lambda arrival: (arrival.time, arrival.model))


def _of(model: Model, duration: float, seed: int, sigma: float) -> list[Arrival]:
    if model.rate <= 0:
        return []
    source = random.Random(f"{seed}/{model.name}")
    found = []
    time = source.expovariate(model.rate)
    while time < duration:
        prompt = _length(source, model.prompt_tokens, sigma, LONGEST // 2)
        output = _length(source, model.output_tokens, sigma, LONGEST // 2)
        found.append(Arrival(time, model.name, prompt, output))
        time += source.expovariate(model.rate)
    return found


def _length(source: random.Random, mean: float, sigma: float, most: int) -> int:
    drawn = source.lognormvariate(math.log(mean) - sigma**2 / 2, sigma) if sigma else mean
    return max(1, min(most, round(drawn)))
