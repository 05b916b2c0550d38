"""The test's side of a mesh: what a worker does for its ranks, which are processes of `rank.py`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from muxserve.engine.arena import SharedArena
from muxserve.engine.checkpoint import Checkpoint, fill
from muxserve.engine.link import Link
from muxserve.engine.messages import (
    AddModel,
    DecodeJob,
    DecodeRow,
    EndLease,
    JobDone,
    ModelAdded,
    PrefillChunk,
    PrefillJob,
    Ready,
    Report,
    Sampling,
    Step,
)
from muxserve.engine.parallel.checkpoint import shard_checkpoint
from muxserve.engine.parallel.group import ENVIRONMENT
from muxserve.engine.spec import KVLayout
from muxserve.engine.tables import SequenceTables
from muxserve.engine.weights import weights_memfd

ROOT = Path(__file__).resolve().parents[3]
GREEDY = Sampling(temperature=0.0)
BLOCK_BYTES = 4096
Tokens = list[int]


class Mesh:
    """Ranks with an arena each, full of NaN, and one block table for all of them."""

    def __init__(self, ranks: int = 2, timeout: float = 60.0, blocks: int = 4096) -> None:
        self.ranks = ranks
        meeting = os.memfd_create("meeting")
        control = [Link.pair() for _ in range(ranks - 1)]
        self.links: list[Link[Any]] = []
        self.processes: list[subprocess.Popen[str]] = []
        for rank in range(ranks):
            ours, theirs = Link.pair()
            ours.settimeout(120)
            mine = [pair[0] for pair in control] if rank == 0 else [control[rank - 1][1]]
            self.links.append(Link(ours, Report))
            self.processes.append(_start(rank, ranks, meeting, theirs, mine, timeout))
            theirs.close()
        for one, other in control:
            one.close()
            other.close()
        os.close(meeting)
        self._arenas = [SharedArena.create(blocks * BLOCK_BYTES, BLOCK_BYTES) for _ in range(ranks)]
        for link, arena in zip(self.links, self._arenas, strict=True):
            arena.data.fill(0xFF)
            assert isinstance(link.receive()[0], Ready)
        # To start may take long; now that all have, they meet.
        for link, arena in zip(self.links, self._arenas, strict=True):
            link.send(arena.descriptor(), [arena.fd])
        for link in self.links:
            assert isinstance(link.receive()[0], Ready)
        self._free = np.arange(blocks, dtype=np.int32)
        self._jobs = 0
        self.tables: dict[str, SequenceTables] = {}

    def __enter__(self) -> Mesh:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for link in self.links:
            link.close()
        for process in self.processes:
            if kind is not None:
                process.kill()
            process.wait(timeout=60)

    def add(self, name: str, checkpoint: Checkpoint, *, slots: int, context: int) -> None:
        """Load each rank's part, in place of the model of that name. All slots have all their blocks,
        scattered over the arena: the same ids for every rank."""
        parts = [shard_checkpoint(checkpoint, rank, self.ranks) for rank in range(self.ranks)]
        (layout,) = {_layout(part) for part in parts}  # one layout, so one table serves all
        spans = layout.spans(context)
        needed = slots * spans * layout.blocks_per_span
        if (before := self.tables.pop(name, None)) is not None:
            held = before.blocks.reshape(-1)
            self._free = np.concatenate([self._free, held])
        assert needed <= len(self._free)
        tables = SequenceTables.create(layout, slots, context)
        ids, self._free = np.split(np.random.default_rng(0).permutation(self._free), [needed])
        for slot, groups in enumerate(ids.reshape(slots, spans, -1)):
            tables.acquire(slot)
            tables.assign(slot, 0, groups)
        self.tables[name] = tables
        for link, part in zip(self.links, parts, strict=True):
            weights = weights_memfd(part.weight_bytes())
            fill(part, weights, threads=1)
            command = AddModel(
                model=name,
                spec=checkpoint.spec,
                layout=layout,
                slots=slots,
                context=context,
                weights=part.manifest(),
            )
            link.send(command, [weights, tables.fd])
            os.close(weights)
        for link in self.links:
            assert link.receive()[0] == ModelAdded(name)

    def start(self, name: str, work: Sequence[PrefillChunk] | Sequence[DecodeRow], steps: int = 1) -> int:
        """A job for rank 0; its number."""
        self._jobs += 1
        job: PrefillJob | DecodeJob = PrefillJob(self._jobs, name, tuple(work))  # type: ignore[arg-type]
        if isinstance(work[0], DecodeRow):
            job = DecodeJob(self._jobs, name, tuple(work), steps)  # type: ignore[arg-type]
        self.links[0].send(job)
        return self._jobs

    def end_lease(self, job: int) -> None:
        self.links[0].send(EndLease(job))

    def step(self, rank: int = 0) -> Step | JobDone:
        """The next report of a rank."""
        report = self.links[rank].receive()[0]
        assert isinstance(report, Step | JobDone)
        return report

    def rest(self, rank: int = 0) -> tuple[list[Step], JobDone]:
        """Steps of the job that runs, to its end."""
        steps = []
        while isinstance(report := self.step(rank), Step):
            steps.append(report)
        return steps, report

    def run(
        self, name: str, work: Sequence[PrefillChunk] | Sequence[DecodeRow], steps: int = 1
    ) -> list[Step]:
        """A job from start to end: its steps, which every rank reports alike."""
        self.start(name, work, steps)
        first, *others = [self.rest(rank) for rank in range(self.ranks)]
        assert not first[1].error
        assert all(other == first for other in others)
        return first[0]

    def generate(
        self,
        name: str,
        prompts: Sequence[Tokens],
        new: int,
        *,
        chunk: int,
        sampling: Sampling = GREEDY,
        lease: int = 6,
    ) -> list[Tokens]:
        """`new` tokens of each prompt: all prefilled together in chunks, then decoded in leases."""
        texts: list[Tokens] = [[] for _ in prompts]
        limits = [len(prompt) + new for prompt in prompts]
        for slot, prompt in enumerate(prompts):
            self.tables[name].tokens[slot, : len(prompt)] = prompt
        for start in range(0, max(map(len, prompts)), chunk):
            chunks = []
            for slot, prompt in enumerate(prompts):
                end = min(start + chunk, len(prompt))
                if start < len(prompt):
                    last = sampling if end == len(prompt) else None
                    chunks.append(PrefillChunk(slot, start, end, limits[slot], last))
            self._take(texts, self.run(name, chunks))
        while going := [slot for slot, text in enumerate(texts) if len(text) < new]:
            rows = [
                DecodeRow(slot, len(prompts[slot]) + len(texts[slot]), limits[slot], sampling)
                for slot in going
            ]
            self._take(texts, self.run(name, rows, lease))
        return texts

    @staticmethod
    def _take(texts: list[Tokens], steps: list[Step]) -> None:
        for step in steps:
            for slot, token in zip(step.slots, step.tokens, strict=True):
                texts[slot].append(token)


def _layout(part: Checkpoint) -> KVLayout:
    spec = part.spec
    return KVLayout(
        layers=len(spec.layers),
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        block_bytes=BLOCK_BYTES,
    )


def _start(
    rank: int,
    ranks: int,
    meeting: int,
    worker: socket.socket,
    control: list[socket.socket],
    timeout: float,
) -> subprocess.Popen[str]:
    passed = [meeting, worker.fileno(), *(one.fileno() for one in control)]
    options = ["--rank", rank, "--ranks", ranks, "--meeting", meeting, "--worker", worker.fileno()]
    options += ["--timeout", timeout, "--control", *passed[2:]]
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "tests.engine.parallel.rank", *map(str, options)],
        cwd=ROOT,
        pass_fds=passed,
        env=os.environ | ENVIRONMENT,
        text=True,
    )
