"""What is asked and when: requests drawn from distributions, or read from a trace.

Arrivals are open loop: they are fixed before the run and wait for no answer. Whatever is random comes from a
seed and is drawn per model, as gaps in units of the mean gap: the same seed at another rate gives the same
requests, closer together or further apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

SHAREGPT_PROMPT, SHAREGPT_OUTPUT = 161.0, 338.0
"""Mean tokens of prompts and answers in ShareGPT, as the MuxServe paper gives them."""

SIGMA_PROMPT, SIGMA_OUTPUT = 1.1, 0.8
"""Standard deviations of their logarithms. Our choice: the paper gives means alone, and
conversations' prompts spread wider than answers."""


class TraceError(ValueError):
    """A line of a trace is not a request; the message names file, line and field."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a run."""

    at: float
    """Intended arrival, in seconds after the run's begin."""
    model: str
    prompt: tuple[int, ...] | str
    """Token ids, or text that the server tokenizes."""
    output_tokens: int
    """To be generated: end-of-sequence tokens are ignored. At least 1."""
    tenant: str = ""
    priority: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt; for text a guess of four characters a token."""
        return max(1, len(self.prompt) // 4) if isinstance(self.prompt, str) else len(self.prompt)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal numbers of tokens of prompts and outputs, clipped so that both fit the context."""

    prompt: float = SHAREGPT_PROMPT
    """Mean before clipping."""
    output: float = SHAREGPT_OUTPUT
    sigma_prompt: float = SIGMA_PROMPT
    """Of the logarithm; 0: all alike."""
    sigma_output: float = SIGMA_OUTPUT
    context: int = 2048
    """Most tokens of prompt and output together."""

    def scaled(self, factor: float, output_factor: float | None = None) -> Lengths:
        """The same shape with means times `factor`; outputs times `output_factor` if that is given."""
        more = factor if output_factor is None else output_factor
        return replace(self, prompt=self.prompt * factor, output=self.output * more)

    def draw(self, random: np.random.Generator) -> tuple[int, int]:
        """Tokens of one prompt and its output."""
        prompt = self._one(random, self.prompt, self.sigma_prompt, self.context // 2)
        return prompt, self._one(random, self.output, self.sigma_output, self.context - prompt)

    @staticmethod
    def _one(random: np.random.Generator, mean: float, sigma: float, most: int) -> int:
        drawn = random.lognormal(math.log(mean) - sigma * sigma / 2, sigma)
        return int(min(max(1, round(drawn)), most))


@dataclass(frozen=True, slots=True)
class Stream:
    """What one model is asked: its part of the traffic, and how long its requests are."""

    model: str
    share: float
    """Of all requests, or in any other unit: shares are relative."""
    lengths: Lengths = field(default_factory=Lengths)


def popularity(models: Sequence[str], alpha: float) -> dict[str, float]:
    """Parts of the traffic by model, most popular first: (i + 1)^-alpha, summing to 1."""
    weights = [(index + 1) ** -alpha for index in range(len(models))]
    return {model: weight / sum(weights) for model, weight in zip(models, weights, strict=True)}


@dataclass(frozen=True, slots=True)
class Mix:
    """Traffic without its rate: streams, tenants, and what prompts are made of."""

    streams: tuple[Stream, ...]
    tenants: Mapping[str, float] = field(default_factory=lambda: {"": 1.0})
    """Parts of each stream by tenant; relative."""
    priority: int = 0
    vocabulary: int = 1000
    """Token ids are drawn from its upper half: every tokenizer has them, and none is a special one."""
    text: bool = False
    """Prompts are text of about so many tokens, for servers that take no token ids."""

    def poisson(self, rate: float, duration: float, seed: int) -> list[Request]:
        """Requests of `duration` seconds at `rate` a second in all, in order of arrival."""
        total = sum(stream.share for stream in self.streams)
        found: list[Request] = []
        for number, stream in enumerate(self.streams):
            if stream.share > 0:
                found += self._of(stream, rate * stream.share / total, duration, (seed, number))
        return sorted(found, key=lambda request: request.at)

    def _of(self, stream: Stream, rate: float, duration: float, seed: tuple[int, int]) -> list[Request]:
        # Separate ones, so that a draw more of one kind shifts none of the others.
        gaps, sizes, words, owners = (np.random.default_rng((*seed, kind)) for kind in range(4))
        names, weights = list(self.tenants), np.array(list(self.tenants.values()), dtype=float)
        weights /= weights.sum()
        found = []
        at = gaps.exponential() / rate
        while at < duration:
            prompt, output = stream.lengths.draw(sizes)
            owner = names[int(owners.choice(len(names), p=weights))]
            found.append(Request(at, stream.model, self.words(words, prompt), output, owner, self.priority))
            at += gaps.exponential() / rate
        return found

    def mean_output(self, seed: int) -> float:
        """Tokens that a request asks for on average, after clipping."""
        drawn = self.poisson(1.0, 3000.0, seed)
        return sum(request.output_tokens for request in drawn) / len(drawn)

    def words(self, random: np.random.Generator, tokens: int) -> tuple[int, ...] | str:
        """A prompt of so many tokens."""
        ids = random.integers(self.vocabulary // 2, self.vocabulary, tokens)
        if self.text:
            return " ".join(_WORDS[number % len(_WORDS)] for number in ids.tolist())
        return tuple(ids.tolist())


_WORDS = (
    "time",
    "way",
    "year",
    "work",
    "day",
    "man",
    "world",
    "life",
    "house",
    "point",
    "hand",
    "part",
    "place",
)
"""Common enough to be one token each in most vocabularies."""


def merge(*workloads: Iterable[Request]) -> list[Request]:
    """All of them, in order of arrival."""
    return sorted((request for each in workloads for request in each), key=lambda request: request.at)


def shifted(requests: Iterable[Request], seconds: float) -> list[Request]:
    """The same, later."""
    return [replace(request, at=request.at + seconds) for request in requests]


def read_trace(path: Path, mix: Mix, time_scale: float = 1.0, seed: int = 0) -> list[Request]:
    """A trace: JSON lines with `time` (seconds), `model`, `output_tokens`, one of `prompt` (text),
    `prompt_ids` and `prompt_tokens` (a number: ids are drawn as `mix` does), and if wanted `tenant` and
    `priority`.

    time_scale: seconds of the run for one of the trace. Raises TraceError, OSError.
    """
    words = np.random.default_rng(seed)
    found = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    found.append(_entry(json.loads(line), mix, words, time_scale))
                except (ValueError, TypeError) as error:
                    raise TraceError(f"{path}, line {number}: {error}") from error
    return sorted(found, key=lambda request: request.at)


def _entry(entry: Any, mix: Mix, words: np.random.Generator, time_scale: float) -> Request:
    if not isinstance(entry, dict):
        raise TypeError("not an object")
    known = {"time", "model", "output_tokens", "prompt", "prompt_ids", "prompt_tokens", "tenant", "priority"}
    if unknown := sorted(entry.keys() - known):
        raise ValueError(f"unknown field {unknown[0]}")
    if missing := sorted({"time", "model", "output_tokens"} - entry.keys()):
        raise ValueError(f"{missing[0]} is missing")
    if sum(name in entry for name in ("prompt", "prompt_ids", "prompt_tokens")) != 1:
        raise ValueError("give exactly one of prompt, prompt_ids and prompt_tokens")
    time, output = float(entry["time"]), int(entry["output_tokens"])
    if not (math.isfinite(time) and time >= 0):
        raise ValueError(f"time must be 0 or more, not {time}")
    if output < 1:
        raise ValueError(f"output_tokens must be 1 or more, not {output}")
    prompt: tuple[int, ...] | str
    if "prompt" in entry:
        prompt = str(entry["prompt"])
    elif "prompt_ids" in entry:
        prompt = tuple(int(token) for token in entry["prompt_ids"])
    else:
        prompt = mix.words(words, int(entry["prompt_tokens"]))
    if not prompt:
        raise ValueError("the prompt is empty")
    tenant, priority = str(entry.get("tenant", "")), int(entry.get("priority", 0))
    return Request(time * time_scale, str(entry["model"]), prompt, output, tenant, priority)


def trace_line(request: Request) -> str:
    """The request as `read_trace` reads it."""
    entry: dict[str, Any] = {
        "time": round(request.at, 6),
        "model": request.model,
        "output_tokens": request.output_tokens,
    }
    if isinstance(request.prompt, str):
        entry["prompt"] = request.prompt
    else:
        entry["prompt_ids"] = list(request.prompt)
    if request.tenant:
        entry["tenant"] = request.tenant
    if request.priority:
        entry["priority"] = request.priority
    return json.dumps(entry)
