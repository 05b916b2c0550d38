"""The requests of `benchmarks.engine.steady`: a cohort of random ones that come again and again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.engine.plan import FIRST_ID
from muxserve.engine.messages import Sampling


@dataclass(frozen=True)
class Options:
    """What to run. Lengths are drawn evenly from 1 + shortest … longest."""

    model: Path | None = None
    """None: SmolLM2-135M-Instruct."""
    requests: int = 1000
    """To count, a multiple of `cohort`."""
    cohort: int = 100
    """Distinct requests."""
    shortest_prompt: int = 16
    longest_prompt: int = 256
    shortest_text: int = 16
    longest_text: int = 160
    streams: int = 24
    """About how many go on at once: the pool is made for them."""
    target: float = 0.9
    """Of the pool, up to which requests are admitted."""
    threads: int = 2
    block_bytes: int = 16 * 2**10
    seed: int = 0


@dataclass(slots=True)
class Request:
    """One of the cohort, on its way. cpu_s: its share of the jobs it was in."""

    number: int
    prompt: list[int]
    limit: int
    sampling: Sampling
    admitted: float = 0.0
    slot: int = -1
    spans: int = 0
    text: list[int] = field(default_factory=list)
    ended: bool = False
    cpu_s: float = 0.0
    recomputed: bool = False

    @property
    def length(self) -> int:
        """Tokens that are known."""
        return len(self.prompt) + len(self.text)


def make_cohort(options: Options, vocabulary: int) -> list[Request]:
    """Every second one is sampled, so that the sampler's costly ways have their part."""
    source = random.Random(options.seed)
    found = []
    for number in range(options.cohort):
        length = source.randint(options.shortest_prompt, options.longest_prompt)
        prompt = source.choices(range(FIRST_ID, vocabulary), k=length)
        limit = length + source.randint(options.shortest_text, options.longest_text)
        temperature = 0.0 if number % 2 else 0.8
        sampling = Sampling(temperature=temperature, top_p=0.95, seed=number, prompt_length=length)
        found.append(Request(number, prompt, limit, sampling))
    return found
