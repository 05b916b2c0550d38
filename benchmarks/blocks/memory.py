"""What blocks of a size cost in memory: bytes that running sequences hold and do not use, and table entries.

A sequence of n tokens holds whole spans. What it does not use is the rest of the last one, in every layer and
KV head. Contiguous KV must be reserved for the longest sequence that is served, since it cannot grow.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.blocks.layouts import CONTIGUOUS, SIZES
from muxserve.engine.pool import BlockPool
from muxserve.engine.spec import ITEMSIZE, KVLayout

Lengths = NDArray[np.int64]

LONGEST = 4096
"""Tokens of the longest sequence that is served: what tables are as wide as."""
SAMPLES = 200_000
SIGMA = 1.0
"""Of the logarithm of prompts' and answers' lengths: an assumption, traces' means are known."""
ENTRY = 4
"""Bytes of a block's number in a table."""
POOL_SEQUENCES, POOL_TOKENS = 64, 1024

MODELS = {
    "SmolLM2-135M": (30, 3, 64),
    "Llama-3.1-8B": (32, 8, 128),
    "Gemma-3-4B": (34, 4, 256),
}
"""(layers, KV heads, head size)."""


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Prompts and answers of these mean lengths; a sequence is seen at a random moment while it decodes."""

    prompt: float
    answer: float

    def draw(self, chance: np.random.Generator) -> Lengths:
        """`[SAMPLES]` lengths at that moment, each at most LONGEST."""
        parts = (self._lognormal(mean, chance) for mean in (self.prompt, self.answer))
        prompt, answer = (np.maximum(part, 1) for part in parts)
        # Long answers take long: they are met in proportion to their length.
        met = chance.choice(SAMPLES, SAMPLES, p=answer / answer.sum())
        seen = prompt[met] + chance.random(SAMPLES) * answer[met]
        return np.clip(np.ceil(seen), 1, LONGEST).astype(np.int64)

    @staticmethod
    def _lognormal(mean: float, chance: np.random.Generator) -> NDArray[np.float64]:
        return chance.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, SAMPLES)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Any length is as likely as another."""

    def draw(self, chance: np.random.Generator) -> Lengths:
        """`[SAMPLES]` lengths from 1 to LONGEST."""
        return chance.integers(1, LONGEST, SAMPLES, endpoint=True)


WORKLOADS: dict[str, Lognormal | Uniform] = {
    "ShareGPT": Lognormal(161, 338),
    "ChatLMSYS": Lognormal(100, 261),
    "uniform": Uniform(),
}
"""Means of the lognormal ones: those of the MuxServe paper's workloads."""


class Waste(msgspec.Struct, frozen=True, kw_only=True):
    """One model under one layout and workload; means over running sequences. tokens: of a sequence.
    unused_bytes: held and not used by a sequence. unused: their part of what is held. blocks: that a sequence
    holds."""

    model: str
    workload: str
    layout: str
    tokens: float
    unused_bytes: float
    unused: float
    blocks: float


class Tables(msgspec.Struct, frozen=True, kw_only=True):
    """One model under one layout. tokens: of a block. table_bytes: for each sequence that can be open, and
    read in each step of one of LONGEST tokens, beside its kv_bytes. pool_s: for BlockPool to give out and
    take back what POOL_SEQUENCES sequences of POOL_TOKENS hold."""

    model: str
    layout: str
    tokens: int
    table_bytes: int
    kv_bytes: int
    pool_s: float


def waste() -> list[Waste]:
    """Every model, workload and layout."""
    found = []
    for workload, kind in WORKLOADS.items():
        lengths = kind.draw(np.random.default_rng(4))
        for model in MODELS:
            found += [_waste(model, workload, layout, lengths) for layout in (CONTIGUOUS, *SIZES)]
    return found


def _waste(model: str, workload: str, name: str, lengths: Lengths) -> Waste:
    layers, kv_heads, head_dim = MODELS[model]
    used = float(lengths.mean()) * layers * kv_heads * _token_bytes(head_dim)
    if name == CONTIGUOUS:
        blocks = float(layers * kv_heads)
        held = blocks * LONGEST * _token_bytes(head_dim)
    else:
        layout = _layout(model, name)
        spans = -(-lengths // layout.tokens_per_block)
        blocks = float(spans.mean()) * layout.blocks_per_span
        held = blocks * layout.block_bytes
    return Waste(
        model=model,
        workload=workload,
        layout=name,
        tokens=float(lengths.mean()),
        unused_bytes=held - used,
        unused=1 - used / held,
        blocks=blocks,
    )


def tables() -> list[Tables]:
    """Every model under every size of blocks."""
    found = []
    for model, (layers, kv_heads, head_dim) in MODELS.items():
        for name in SIZES:
            layout = _layout(model, name)
            found.append(
                Tables(
                    model=model,
                    layout=name,
                    tokens=layout.tokens_per_block,
                    table_bytes=layout.blocks_per_span * layout.spans(LONGEST) * ENTRY,
                    kv_bytes=LONGEST * layers * kv_heads * _token_bytes(head_dim),
                    pool_s=_pool_seconds(layout),
                )
            )
    return found


def _pool_seconds(layout: KVLayout) -> float:
    spans = layout.spans(POOL_TOKENS)
    pool = BlockPool(POOL_SEQUENCES * spans * layout.blocks_per_span)
    pool.register("model", layout, pool.blocks)
    least = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        held = [pool.allocate("model", spans) for _ in range(POOL_SEQUENCES)]
        for ids in held:
            pool.free("model", ids)
        least = min(least, time.perf_counter() - begun)
    return least


def _layout(model: str, name: str) -> KVLayout:
    layers, kv_heads, head_dim = MODELS[model]
    return KVLayout(
        layers=layers, kv_heads=kv_heads, head_dim=head_dim, dtype="bfloat16", block_bytes=SIZES[name]
    )


def _token_bytes(head_dim: int) -> int:
    """K and V of one token in one layer's KV head."""
    return 2 * head_dim * ITEMSIZE["bfloat16"]
