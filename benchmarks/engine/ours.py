"""Our engine alone as a contender: `python -m benchmarks.engine.ours --model PATH …`.

The executor's part and as much of the worker's as it takes: arena, tables and weights in shared memory,
blocks from a pool, prefill in jobs of as many tokens as the scheduler puts into one, then one decode job. No
service, no socket, no second process.
"""

from __future__ import annotations

import argparse
import itertools
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.engine.peers.wire import Prompts, Stopwatch, Timing, serve
from muxserve.engine.arena import SharedArena
from muxserve.engine.checkpoint import open_checkpoint
from muxserve.engine.cpu.jobs import NativeJob
from muxserve.engine.cpu.runner import CpuRunner
from muxserve.engine.messages import (
    AddModel,
    DecodeJob,
    DecodeRow,
    PrefillChunk,
    PrefillJob,
    Sampling,
    Step,
    WeightLayout,
)
from muxserve.engine.pool import BlockPool
from muxserve.engine.spec import ITEMSIZE, KVLayout, ModelSpec
from muxserve.engine.tables import SequenceTables
from muxserve.engine.weights import weights_memfd
from muxserve.scheduler.policy.interface import PolicyOptions
from muxserve.worker.settings import WorkerSettings

MODEL = "m"
LAYOUT: WeightLayout = "panels"
CHUNK_TOKENS = PolicyOptions().chunk_tokens
BLOCK_BYTES = int(WorkerSettings.model_fields["block_bytes"].default)
GREEDY = Sampling(temperature=0.0)


class Engine:
    """One model, ready to generate."""

    def __init__(self, options: argparse.Namespace) -> None:
        checkpoint = open_checkpoint(Path(options.model), "bfloat16")
        self.spec = spec = checkpoint.spec
        self.layout = KVLayout(
            layers=len(spec.layers),
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            dtype=spec.dtype,
            block_bytes=options.block_bytes,
        )
        self._jobs = itertools.count()
        # A sequence's last span is half empty on average and whole at worst.
        groups = self.layout.spans(options.tokens) + options.slots
        blocks = groups * self.layout.blocks_per_span
        self._arena = arena = SharedArena.create(blocks * options.block_bytes, options.block_bytes)
        values = np.random.default_rng(0).standard_normal(options.block_bytes // 2)
        self._noise = values.astype(ml_dtypes.bfloat16).view(np.uint8)
        self._pool = BlockPool(arena.blocks)
        self._pool.register(MODEL, self.layout, arena.blocks)
        self._tables = SequenceTables.create(self.layout, options.slots, options.context)
        self.load_s, weights_fd = _load(Path(options.model), checkpoint.weight_bytes(LAYOUT), options)
        self._runner = CpuRunner(options.threads)
        self._runner.attach(arena.descriptor(), [os.dup(arena.fd)])
        manifest = checkpoint.manifest(LAYOUT)
        slots, context = options.slots, options.context
        model = AddModel(MODEL, spec, self.layout, slots, context, manifest, LAYOUT)
        self._runner.add(model, [weights_fd, os.dup(self._tables.fd)])

    def generate(self, prompts: Prompts, new: int, filled: bool = False) -> Timing:
        """As `peers.wire` has it."""
        clock = Stopwatch(len(prompts))
        slots: list[int] = []
        try:
            # One by one: what was opened before a failure is closed.
            slots.extend(self._open(ids, len(ids) + new) for ids in prompts)
            rows = {slot: row for row, slot in enumerate(slots)}
            if filled:
                filling = zip(slots, prompts, strict=True)
                clock.arrived([(rows[slot], [self._fill(slot, ids)]) for slot, ids in filling])
            for job in () if filled else self._prefill_jobs(prompts, slots, new):
                for step in self._run(self._runner.start(job)):
                    clock.arrived([(rows[s], [t]) for s, t in zip(step.slots, step.tokens, strict=True)])
            parts = self._decode(prompts, slots, new, clock, rows) if new > 1 else {}
        finally:
            for slot, ids in zip(slots, prompts, strict=False):
                self._close(slot, len(ids) + new)
        timing = clock.timing(new)
        timing.parts = parts
        return timing

    def _decode(
        self, prompts: Prompts, slots: list[int], new: int, clock: Stopwatch, rows: dict[int, int]
    ) -> dict[str, float]:
        lengths = (len(ids) + 1 for ids in prompts)
        batch = tuple(
            DecodeRow(slot, length, length - 1 + new, GREEDY)
            for slot, length in zip(slots, lengths, strict=True)
        )
        running = self._runner.start(DecodeJob(next(self._jobs), MODEL, batch, new - 1))
        for step in self._run(running):
            clock.arrived([(rows[s], [t]) for s, t in zip(step.slots, step.tokens, strict=True)])
        return running.parts

    def _fill(self, slot: int, ids: list[int]) -> int:
        """Write random KV to all blocks of the slot, and the token after the prompt, which is returned."""
        groups = self._tables.groups(slot, self.layout.spans(len(ids)))
        blocks = self._arena.data.reshape(-1, self.layout.block_bytes)
        blocks[groups.reshape(-1)] = self._noise
        self._tables.tokens[slot, len(ids)] = ids[0]
        return ids[0]

    def _prefill_jobs(self, prompts: Prompts, slots: Sequence[int], new: int) -> Iterator[PrefillJob]:
        chunks: list[PrefillChunk] = []
        left = CHUNK_TOKENS
        for slot, ids in zip(slots, prompts, strict=True):
            start = 0
            while start < len(ids):
                end = min(len(ids), start + left)
                sampling = GREEDY if end == len(ids) else None
                chunks.append(PrefillChunk(slot, start, end, len(ids) + new, sampling))
                left -= end - start
                start = end
                if not left:
                    yield PrefillJob(next(self._jobs), MODEL, tuple(chunks))
                    chunks, left = [], CHUNK_TOKENS
        if chunks:
            yield PrefillJob(next(self._jobs), MODEL, tuple(chunks))

    def _run(self, job: NativeJob) -> Iterator[Step]:
        """The job's steps as they come. Raises its fault."""
        while not job.ended:
            select.select([self._runner], [], [])
            self._runner.acknowledge()
            yield from job.collect()
        yield from job.collect()
        if job.error is not None:
            raise job.error

    def _open(self, ids: list[int], limit: int) -> int:
        slot = self._tables.acquire(MODEL)
        self._tables.tokens[slot, : len(ids)] = ids
        # The last token of a sequence is sampled and its KV never written.
        self._tables.assign(slot, 0, self._pool.allocate(MODEL, self.layout.spans(limit - 1)))
        return slot

    def _close(self, slot: int, limit: int) -> None:
        self._pool.free(MODEL, self._tables.groups(slot, self.layout.spans(limit - 1)))
        self._tables.release(slot)


def _load(path: Path, size: int, options: argparse.Namespace) -> tuple[float, int]:
    """Have a loader fill memory with the weights, as the worker does; seconds that took, and the memory."""
    kept = WorkerSettings.model_fields["weight_cache"].get_default(call_default_factory=True)
    fd = weights_memfd(size)
    arguments = ["--path", f"{path}", "--dtype", "bfloat16", "--layout", LAYOUT, "--fd", f"{fd}"]
    arguments += ["--threads", f"{options.threads}"]
    if kept is not None and not options.no_weight_cache:
        arguments += ["--cache", f"{kept}"]
    begun = time.perf_counter()
    subprocess.run((sys.executable, "-m", "muxserve.engine.loader", *arguments), pass_fds=[fd], check=True)
    return time.perf_counter() - begun, fd


def figures(spec: ModelSpec, layout: KVLayout) -> dict[str, Any]:
    """What a roofline needs to know of the model: bytes and operations per token."""
    itemsize = ITEMSIZE[spec.dtype]
    width = spec.heads * spec.head_dim
    qkv = (spec.heads + 2 * spec.kv_heads) * spec.head_dim
    inner = 3 * spec.intermediate_size
    layer = spec.hidden_size * (qkv + width + inner)
    head = spec.vocab_size * spec.hidden_size
    return {
        "layers_weight_bytes": layer * len(spec.layers) * itemsize,
        "head_weight_bytes": head * itemsize,
        "layers_flop_per_token": 2 * layer * len(spec.layers),
        "head_flop_per_token": 2 * head,
        "attention_flop_per_token_and_position": 4 * width * len(spec.layers),
        "kv_bytes_per_token": 2 * layout.blocks_per_span * spec.head_dim * itemsize,
        "vocabulary": spec.vocab_size,
        "context_length": spec.context_length,
        "block_bytes": layout.block_bytes,
        "chunk_tokens": CHUNK_TOKENS,
    }


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True, help="model directory or GGUF file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True, help="most sequences at once")
    parser.add_argument("--context", type=int, required=True, help="tokens of the longest sequence")
    parser.add_argument("--tokens", type=int, required=True, help="tokens of all sequences at once, at most")
    parser.add_argument("--block-bytes", type=int, default=BLOCK_BYTES)
    parser.add_argument("--no-weight-cache", action="store_true")
    options = parser.parse_args()

    def start() -> tuple[Any, dict[str, Any]]:
        engine = Engine(options)
        about = {"load_s": engine.load_s, "threads": options.threads}
        return engine.generate, about | {"model": figures(engine.spec, engine.layout)}

    serve(start)


if __name__ == "__main__":
    main()
