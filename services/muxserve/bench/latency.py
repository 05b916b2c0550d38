"""Unloaded latency: what a request takes alone on the device, and the objective that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from muxserve.bench.generator import Generator
from muxserve.bench.outcomes import Status
from muxserve.bench.targets import Failed, Target
from muxserve.bench.workload import Lengths, Mix, Request, Stream

REPEATS = 3


@dataclass(frozen=True, slots=True)
class Unloaded:
    """Seconds of a lone request: base + prompt · tokens of the prompt + output · tokens after the first."""

    base: float
    prompt: float
    output: float

    def latency(self, prompt_tokens: int, output_tokens: int) -> float:
        """Until the last token."""
        return self.ttft(prompt_tokens) + self.output * max(0, output_tokens - 1)

    def ttft(self, prompt_tokens: int) -> float:
        """Until the first token."""
        return self.base + self.prompt * prompt_tokens


@dataclass(frozen=True, slots=True)
class Lone:
    """A request that was alone."""

    prompt_tokens: int
    output_tokens: int
    ttft: float
    latency: float


@dataclass(frozen=True, slots=True)
class Slo:
    """The objective of a request: `scale` times its unloaded latency."""

    scale: float
    unloaded: Mapping[str, Unloaded]
    """By model."""

    def seconds(self, model: str, prompt_tokens: int, output_tokens: int) -> float:
        """From arrival to the last token."""
        return self.scale * self.unloaded[model].latency(prompt_tokens, output_tokens)

    def deadline(self, request: Request) -> float:
        """The same, as the generator wants it."""
        return self.seconds(request.model, request.prompt_tokens, request.output_tokens)


def fit(lone: Sequence[Lone]) -> Unloaded:
    """The least squares of relative errors, first of the time to first token, then of the rest.

    Noise only ever adds: of requests of equal lengths the fastest counts.
    """
    best: dict[tuple[int, int], Lone] = {}
    for one in lone:
        key = (one.prompt_tokens, one.output_tokens)
        if key not in best or one.latency < best[key].latency:
            best[key] = one
    ttft = np.array([one.ttft for one in best.values()])
    prompt = np.array([one.prompt_tokens for one in best.values()], dtype=float)
    columns = np.stack([np.ones_like(prompt), prompt], axis=1)
    solved = np.linalg.lstsq(columns / ttft[:, None], np.ones_like(ttft), rcond=None)[0]
    slope = max(0.0, float(solved[1]))
    base = max(0.0, float(np.mean(ttft - slope * prompt)))
    steps = [
        (one.latency - one.ttft) / (one.output_tokens - 1) for one in best.values() if one.output_tokens > 1
    ]
    return Unloaded(base, slope, float(np.mean(steps)) if steps else 0.0)


def grid(lengths: Lengths) -> list[tuple[int, int]]:
    """Lengths to calibrate with: short and long prompts and outputs, around those of the workload."""
    prompts = sorted({max(1, round(lengths.prompt * part)) for part in (0.5, 1, 3)})
    outputs = sorted({max(2, round(lengths.output * part)) for part in (0.5, 1.5)})
    half = lengths.context // 2
    return [(min(p, half), min(o, half)) for p in prompts for o in outputs]


async def calibrate(target: Target, stream: Stream, mix: Mix, repeats: int = REPEATS) -> list[Lone]:
    """Lone requests of `stream.model`, one after another. Raises Failed where one is not answered."""
    found = []
    words = np.random.default_rng(2**31)
    shapes = grid(stream.lengths)
    # The first one is not counted: it may be what wakes the server up.
    for prompt, output in [shapes[0], *shapes * repeats]:
        request = Request(0.0, stream.model, mix.words(words, prompt), output)
        outcome = (await Generator([request], {stream.model: target}).run()).outcomes[0]
        if outcome.status is not Status.OK or outcome.ttft is None:
            raise Failed(f"{target.name}, model {stream.model}: {outcome.status}: {outcome.error}")
        found.append(Lone(outcome.prompt_tokens, outcome.tokens, outcome.ttft, outcome.latency))
    return found[1:]
