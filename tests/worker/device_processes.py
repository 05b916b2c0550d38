"""Executor and loader processes on a fake device: `python -m tests.worker.device_processes ROLE DIRECTORY …`.

An `executor` computes next to nothing, but with what the worker gave it: it maps arena and weights, compares
the weights with the checkpoint, keeps tokens in the blocks that it was told, and makes text out of them. An
`interpreter` has the runner of a GPU, with interpreted kernels.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from muxserve.engine import executor
from muxserve.engine.checkpoint import Checkpoint, open_checkpoint
from muxserve.engine.cuda.memory import DeviceMemory
from muxserve.engine.messages import (
    LENGTH,
    UNFINISHED,
    AddModel,
    AttachArena,
    DecodeJob,
    PrefillJob,
    Shares,
    Step,
)
from muxserve.engine.runner import Runner
from muxserve.engine.spec import KVLayout
from muxserve.engine.tables import TableViews
from muxserve.worker import loader_process
from tests.engine.cuda.fake import FakeRuntime

Tokens = NDArray[np.int32]
Bytes = NDArray[np.uint8]

PACE = 0.002
"""Seconds that a step takes."""


def salt(checkpoint: Checkpoint) -> int:
    """What a model's text depends on beside its tokens: all of its weights."""
    return zlib.crc32(b"".join(tensor.tobytes() for _, tensor in checkpoint.tensors())) % 1000


def next_token(known: Iterable[int], salt: int) -> int:
    """A token that depends on all before it."""
    tokens = list(known)
    return 3 + (31 * sum(tokens) + 7 * len(tokens) + salt) % 90


class Model:
    """What the executor maps of one."""

    def __init__(self, command: AddModel, weights: DeviceMemory, tables: TableViews, salt: int) -> None:
        self.name = command.model
        self.weights = weights
        self.tables = tables
        self.salt = salt

    def places(self, slot: int, length: int, arena: Bytes) -> list[Tokens]:
        """Where the first tokens of a sequence lie: one each, in its blocks of the first layer and head."""
        layout: KVLayout = self.tables.layout
        found = []
        for position in range(length):
            block = int(self.tables.blocks[0, slot, 0, position // layout.tokens_per_block])
            assert block >= 0, "a block that was not reserved"
            at = block * layout.block_bytes + 4 * (position % layout.tokens_per_block)
            found.append(arena[at : at + 4].view(np.int32))
        return found


class Job:
    """Implements `RunningJob`, on a thread of its own."""

    error: Exception | None = None
    seconds = 0.0
    nears_end = False

    def __init__(self, message: PrefillJob | DecodeJob, model: Model, arena: Bytes, event: int) -> None:
        self.number = message.job
        self.model = message.model
        self.steps = 0
        self.ended = False
        self._message = message
        self._mapped = model
        self._arena = arena
        self._event = event
        self._stopped = False
        self._told: deque[Step] = deque()
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._stopped = True

    def use_shares(self, shares: Shares) -> None:
        assert shares.prefill or shares.decode

    def collect(self) -> list[Step]:
        return [self._told.popleft() for _ in range(len(self._told))]

    def _run(self) -> None:
        try:
            if isinstance(self._message, PrefillJob):
                self._prefill(self._message)
            else:
                self._decode(self._message)
        except Exception as error:
            self.error = error
        self.ended = True
        os.eventfd_write(self._event, 1)

    def _prefill(self, message: PrefillJob) -> None:
        told = []
        for chunk in message.chunks:
            time.sleep(PACE * (chunk.end - chunk.start))
            places = self._mapped.places(chunk.slot, chunk.end, self._arena)
            for position in range(chunk.start, chunk.end):
                places[position][:] = self._mapped.tables.tokens[chunk.slot, position]
            if chunk.sampling is not None:
                token = next_token((int(place[0]) for place in places), self._mapped.salt)
                told.append((chunk.slot, chunk.end, token, chunk.limit))
        self._tell(told)

    def _decode(self, message: DecodeJob) -> None:
        rows = [(row.slot, row.length, row.limit) for row in message.rows]
        for _ in range(message.steps):
            if self._stopped or not rows:
                return
            time.sleep(PACE)
            told = []
            for slot, length, limit in rows:
                places = self._mapped.places(slot, length, self._arena)
                places[-1][:] = self._mapped.tables.tokens[slot, length - 1]
                token = next_token((int(place[0]) for place in places), self._mapped.salt)
                told.append((slot, length, token, limit))
            self._tell(told)
            rows = [(slot, length + 1, limit) for slot, length, limit in rows if length + 1 < limit]

    def _tell(self, told: list[tuple[int, int, int, int]]) -> None:
        for slot, position, token, _ in told:
            self._mapped.tables.tokens[slot, position] = token
        finished = [LENGTH if position + 1 >= limit else UNFINISHED for _, position, _, limit in told]
        slots, positions, tokens = zip(*(each[:3] for each in told), strict=True) if told else ((), (), ())
        self._told.append(Step(self.number, slots, positions, tokens, tuple(finished)))
        self.steps += 1
        os.eventfd_write(self._event, 1)


class CheckingRunner:
    """Implements `Runner`."""

    device = "fake GPU"

    def __init__(self, runtime: FakeRuntime, path: Path, partition: str) -> None:
        self.partition = "green_contexts" if partition == "auto" else partition
        self._runtime = runtime
        self._path = path
        self._event = os.eventfd(0, os.EFD_NONBLOCK)
        self._arena: Bytes = np.empty(0, np.uint8)
        self._models: dict[str, Model] = {}

    def fileno(self) -> int:
        return self._event

    def acknowledge(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)

    def attach(self, command: AttachArena, descriptors: list[int]) -> None:
        assert not descriptors
        size = command.blocks * command.block_bytes
        memory = DeviceMemory.attach(command.cuda_handle, size, "arena", 0, self._runtime)
        self._arena = self._runtime.bytes(memory.pointer, size)

    def add(self, command: AddModel, descriptors: list[int]) -> None:
        (tables_fd,) = descriptors
        tables = TableViews.attach(tables_fd, command.layout, command.slots, command.context)
        os.close(tables_fd)
        checkpoint = open_checkpoint(self._path, "float32")
        assert command.weight_layout == "canonical"
        assert command.weights == checkpoint.manifest()
        size = checkpoint.weight_bytes()
        weights = DeviceMemory.attach(command.weights_handle, size, "weights", 0, self._runtime)
        mapped = self._runtime.bytes(weights.pointer, size)
        for entry, (name, tensor) in zip(command.weights, checkpoint.tensors(), strict=True):
            wanted = tensor.tobytes()
            if mapped[entry.offset : entry.offset + len(wanted)].tobytes() != wanted:
                weights.close()
                raise ValueError(f"{name} is not what the checkpoint has")
        self._models[command.model] = Model(command, weights, tables, salt(checkpoint))

    def remove(self, model: str) -> None:
        if (found := self._models.pop(model, None)) is not None:
            found.weights.close()

    def start(self, message: PrefillJob | DecodeJob) -> Job:
        return Job(message, self._models[message.model], self._arena, self._event)

    def close(self) -> None:
        pass


def interpreting_runner(runtime: FakeRuntime) -> Runner:
    """What computes on a GPU, slowly."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from muxserve.engine.cuda.driver import Driver
    from muxserve.engine.cuda.green import GreenContexts
    from muxserve.engine.cuda.runner import CudaRunner
    from tests.engine.cuda.fake_driver import FakeDriver
    from tests.engine.cuda.host_device import HostDevice

    return CudaRunner(0, HostDevice(), GreenContexts(Driver(FakeDriver(), 0)), runtime)


def main() -> None:
    """ROLE is `executor`, `interpreter` or `loader`; an executor's checkpoint follows the directory."""
    role, directory, *rest = sys.argv[1:]
    runtime = FakeRuntime(Path(directory))
    match role:
        case "loader":
            sys.exit(loader_process.main(rest, runtime))
        case "interpreter":
            executor.main(rest, lambda _: interpreting_runner(runtime))
        case "executor":
            path, *rest = rest
            executor.main(rest, lambda options: CheckingRunner(runtime, Path(path), options.partition))


if __name__ == "__main__":
    main()
