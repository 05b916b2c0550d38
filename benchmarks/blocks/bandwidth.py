"""Attention over the layouts in turn, round after round: what one costs beside the other, noise aside.

All layouts of a shape lie in one arena, one over the other, far larger than the caches; a round is a layer of
each, the layouts in a new random order and the layers in turn. What is compared is a layout's time with
another's in the same round; the median over the rounds is quoted. Rounds in which the kernel took a core away
from either are left out, as long as there are others.
"""

from __future__ import annotations

import functools
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.blocks.layouts import CONTIGUOUS, LAYOUTS, Shape, place
from muxserve.engine.cpu.attention import BlockAttention

Array = NDArray[Any]

HEAD_DIMS = (64, 128, 256)
GROUPS = (1, 4, 8)
CONTEXTS = (1024, 4096)
BATCH = 16
KV_WIDTH = 512
"""KV heads times head size of every shape: all read the same number of bytes per token."""
LAYERS = {1024: 6, 4096: 2}
"""By context: layers take turns, so that none is in a cache when it is read again."""
PROMPTS, CHUNK, HISTORY = 4, 256, 1024
"""Prefill: sequences, new tokens of each, tokens before them."""


LEAST = 5
"""Rounds from which a median is taken."""


class Call(msgspec.Struct, frozen=True, array_like=True):
    """One layer's attention. interrupted: how often the kernel took a core from it."""

    seconds: float
    interrupted: int


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One shape. context: tokens of a sequence, about. bytes_read: KV of one call. tokens: new ones of one
    call. calls: by layout, one of each round."""

    kind: str
    """"decode" or "prefill"."""
    head_dim: int
    group: int
    kv_heads: int
    context: int
    batch: int
    bytes_read: int
    tokens: int
    calls: dict[str, list[Call]]

    def ratio(self, name: str, base: str = CONTIGUOUS) -> float:
        """Speed of one layout in relation to another's."""
        pairs = list(zip(self.calls[base], self.calls[name], strict=True))
        quiet = [pair for pair in pairs if not any(call.interrupted for call in pair)]
        chosen = quiet if len(quiet) >= LEAST else pairs
        return statistics.median(other.seconds / own.seconds for other, own in chosen)

    def seconds(self, name: str) -> float:
        """Of one call, in the median round."""
        calls = self.calls[name]
        quiet = [call for call in calls if not call.interrupted]
        return statistics.median(call.seconds for call in (quiet if len(quiet) >= LEAST else calls))

    def bandwidth(self, name: str) -> float:
        """KV bytes read per second in the best call: ceilings are measured so, too."""
        return self.bytes_read / min(call.seconds for call in self.calls[name])

    @property
    def quiet(self) -> float:
        """Part of the calls that the kernel left alone."""
        calls = [call for calls in self.calls.values() for call in calls]
        return sum(not call.interrupted for call in calls) / len(calls)


def decode_shapes() -> Iterator[tuple[int, Shape]]:
    """Contexts and shapes. Lengths differ, so that sequences end anywhere in a block."""
    chance = np.random.default_rng(1)
    for context in CONTEXTS:
        lengths = tuple(int(n) for n in chance.integers(context * 15 // 16, context * 17 // 16, BATCH))
        for head_dim in HEAD_DIMS:
            for group in GROUPS:
                yield context, Shape(LAYERS[context], KV_WIDTH // head_dim, head_dim, group, lengths)


def prefill_shapes() -> Iterator[tuple[int, Shape]]:
    """The same for prompts with a history."""
    for head_dim in HEAD_DIMS:
        yield HISTORY, Shape(1, KV_WIDTH // head_dim, head_dim, 4, (HISTORY + CHUNK,) * PROMPTS)


def largest() -> int:
    """Bytes of the KV of the largest shape."""
    return max(shape.layers * shape.kv_bytes for _, shape in decode_shapes())


def measure(
    kind: str,
    context: int,
    shape: Shape,
    arena: Array,
    rounds: int,
    seconds: float,
    threads: int,
    new_tokens: int,
) -> Measured:
    """Time up to `rounds` rounds, but for no more than `seconds`, of attention of the last `new_tokens` of
    every sequence."""
    pieces = [(slot, length - new_tokens, length) for slot, length in enumerate(shape.lengths)]
    rows = len(pieces) * new_tokens
    width = (rows, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    qkv = np.random.default_rng(2).standard_normal(width, dtype=np.float32)
    calls: dict[str, list[Call]] = {name: [] for name in LAYOUTS}
    with ExitStack() as stack:
        runs: dict[str, Callable[[int], Array]] = {}
        for name in LAYOUTS:
            attention = _attention(name, shape, arena, threads)
            stack.callback(attention.close)
            runs[name] = functools.partial(attention, pieces=pieces, qkv=qkv)
            runs[name](0)
        end = time.perf_counter() + seconds
        for number in range(rounds):
            if number >= LEAST and time.perf_counter() > end:
                break
            for name in random.Random(number).sample(LAYOUTS, len(LAYOUTS)):
                calls[name].append(_time(runs[name], number % shape.layers))
    return Measured(
        kind=kind,
        head_dim=shape.head_dim,
        group=shape.group,
        kv_heads=shape.kv_heads,
        context=context,
        batch=len(pieces),
        bytes_read=shape.kv_bytes,
        tokens=rows,
        calls=calls,
    )


def _time(run: Callable[[int], Array], layer: int) -> Call:
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    begun = time.perf_counter()
    run(layer)
    seconds = time.perf_counter() - begun
    return Call(round(seconds, 7), resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - taken)


def _attention(name: str, shape: Shape, arena: Array, threads: int) -> BlockAttention:
    placed = place(name, shape, arena.nbytes, seed=3)
    return BlockAttention(
        arena,
        placed.table,
        placed.layout,
        heads=shape.heads,
        scale=shape.head_dim**-0.5,
        threads=threads,
    )
