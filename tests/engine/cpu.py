"""A CPU engine with one model, as an executor has it, for tests to run jobs on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType

import numpy as np

from muxserve.engine.arena import SharedArena
from muxserve.engine.checkpoint import Checkpoint, fill
from muxserve.engine.cpu.runner import CpuRunner
from muxserve.engine.messages import (
    AddModel,
    DecodeJob,
    DecodeRow,
    PrefillChunk,
    PrefillJob,
    Sampling,
    Shares,
    Step,
)
from muxserve.engine.spec import KVLayout
from muxserve.engine.tables import SequenceTables
from muxserve.engine.weights import weights_memfd

Tokens = list[int]
GREEDY = Sampling(temperature=0.0)
ALONE, HALF = Shares(), Shares(0.5, 0.5)
"""All threads of an engine, half of them."""


class CpuEngine:
    """One model over an arena full of NaN, its blocks scattered and all allocated.

    Weights go through a memfd in panels, as an executor gets them. threads: of a job that runs alone.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        slots: int,
        context: int,
        block_bytes: int = 4096,
        threads: int = 1,
        variant: str = "",
    ) -> None:
        spec = checkpoint.spec
        self.layout = KVLayout(
            layers=len(spec.layers),
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            dtype=spec.dtype,
            block_bytes=block_bytes,
        )
        spans = self.layout.spans(context)
        blocks = slots * spans * self.layout.blocks_per_span
        self.arena = SharedArena.create((blocks + 1) * block_bytes, block_bytes)
        self.arena.data.fill(0xFF)
        self.tables = SequenceTables.create(self.layout, slots, context)
        order = np.random.default_rng(0).permutation(blocks).astype(np.int32)
        for slot, ids in enumerate(order.reshape(slots, spans, -1)):
            self.tables.acquire(slot)
            self.tables.assign(slot, 0, ids)
        self.runner = CpuRunner(threads, variant)
        self.runner.attach(self.arena.descriptor(), [os.dup(self.arena.fd)])
        weights = weights_memfd(checkpoint.weight_bytes("panels"))
        fill(checkpoint, weights, threads=1, layout="panels")
        command = AddModel(
            model="m",
            spec=spec,
            layout=self.layout,
            slots=slots,
            context=context,
            weights=checkpoint.manifest("panels"),
            weight_layout="panels",
        )
        self.runner.add(command, [weights, os.dup(self.tables.fd)])

    def __enter__(self) -> CpuEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runner.close()

    def prefill(self, chunks: Sequence[PrefillChunk]) -> Step | None:
        """One prefill job."""
        return next(self.runner.run(PrefillJob(0, "m", tuple(chunks))), None)

    def decode(self, rows: Sequence[DecodeRow], steps: int) -> list[Step]:
        """One decode job."""
        return list(self.runner.run(DecodeJob(0, "m", tuple(rows), steps)))

    def generate(
        self, prompts: Sequence[Tokens], new: int, *, chunk: int, sampling: Sequence[Sampling] | None = None
    ) -> list[Tokens]:
        """`new` tokens of each prompt: prefill of all together in chunks, then decode of all together."""
        chosen = sampling or [GREEDY] * len(prompts)
        limits = [len(prompt) + new for prompt in prompts]
        slots = list(range(len(prompts)))[::-1]
        texts: dict[int, Tokens] = {slot: [] for slot in slots}
        for slot, prompt in zip(slots, prompts, strict=True):
            self.tables.tokens[slot, : len(prompt)] = prompt

        def take(step: Step | None) -> None:
            if step is not None:
                assert not step.failed
                for slot, token in zip(step.slots, step.tokens, strict=True):
                    texts[slot].append(token)

        for start in range(0, max(map(len, prompts)), chunk):
            chunks = []
            for row, prompt in enumerate(prompts):
                end = min(start + chunk, len(prompt))
                if start < len(prompt):
                    last = chosen[row] if end == len(prompt) else None
                    chunks.append(PrefillChunk(slots[row], start, end, limits[row], last))
            take(self.prefill(chunks))
        rows = [
            DecodeRow(slots[row], len(prompt) + 1, limits[row], chosen[row])
            for row, prompt in enumerate(prompts)
        ]
        if new > 1:
            for step in self.decode(rows, new - 1):
                take(step)
        return [texts[slot] for slot in slots]
