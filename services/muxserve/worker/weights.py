"""`WeightStore`: weights in memory, loaded once however many models use them, within a budget."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from muxserve.common.errors import Internal, InvalidArgument, Overloaded
from muxserve.engine.checkpoint import CheckpointError, RequestedDType, open_checkpoint
from muxserve.worker.child import Child
from muxserve.worker.shapes import MIB, Weights
from muxserve.worker.weight_memory import WeightMemories, WeightMemory

log = structlog.get_logger(__name__)

_REPORT_EVERY = 5.0
"""Seconds between lines in the log while a model loads."""


@dataclass(slots=True)
class _Entry:
    memory: WeightMemory
    bytes: int
    users: int
    filled: asyncio.Task[None]


class WeightStore:
    """Memory of weights, by fingerprint. Every `acquire` that returned is undone by one `release`.

    budget: bytes of all weights together. threads: of a loader. timeout: seconds that a load may take.
    memories: where they lie.
    """

    def __init__(self, budget: int, threads: int, timeout: float, memories: WeightMemories) -> None:
        self.budget = budget
        self._memories = memories
        self._threads = threads
        self._timeout = timeout
        self._entries: dict[tuple[object, ...], _Entry] = {}
        self._inspected: dict[tuple[object, ...], Weights] = {}

    @property
    def used(self) -> int:
        """Bytes of weights that are loaded or being loaded."""
        return sum(entry.bytes for entry in self._entries.values())

    async def inspect(self, path: str, dtype: str) -> Weights:
        """Read a checkpoint's headers. Raises InvalidArgument that names the field."""
        return await asyncio.to_thread(self._inspect, path, dtype or "auto")

    async def acquire(self, model: str, path: str, weights: Weights) -> WeightMemory:
        """Memory that holds the weights; it stays the store's.

        Raises Overloaded if they do not fit, InvalidArgument if the checkpoint turns out broken, Internal.
        """
        entry = self._entries.get(weights.fingerprint)
        if entry is None:
            self._check_budget(model, weights)
            memory = self._memories.create(model, weights)
            work = _kept(model) if memory.full else self._fill(model, path, weights, memory)
            filling = asyncio.create_task(work, name=f"load-{model}")
            entry = self._entries[weights.fingerprint] = _Entry(memory, weights.bytes, 0, filling)
        entry.users += 1
        try:
            await asyncio.shield(entry.filled)
        except BaseException:
            await self.release(weights)
            raise
        return entry.memory

    async def release(self, weights: Weights) -> None:
        """The last release ends a load that is still going on, and gives the memory back."""
        entry = self._entries[weights.fingerprint]
        entry.users -= 1
        if entry.users == 0:
            del self._entries[weights.fingerprint]
            entry.filled.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await entry.filled
            entry.memory.close()

    def _check_budget(self, model: str, weights: Weights) -> None:
        left = self.budget - self.used
        if weights.bytes > left:
            raise Overloaded(
                f'weights of model "{model}" take {weights.bytes / MIB:.0f} MiB; of this worker\'s '
                f"{self.budget / MIB:.0f} MiB for weights {max(left, 0) / MIB:.0f} MiB are left",
                retry_after=None,
            )

    def _inspect(self, path: str, dtype: str) -> Weights:
        try:
            key = (*_fingerprint(Path(path)), dtype)
            if (known := self._inspected.get(key)) is None:
                requested: RequestedDType = dtype  # type: ignore[assignment]  # checked by open_checkpoint
                checkpoint = open_checkpoint(Path(path), requested)
                resolved, layout = (*key[:-1], checkpoint.spec.dtype), self._memories.layout
                manifest, size = checkpoint.manifest(layout), checkpoint.weight_bytes(layout)
                known = Weights(checkpoint.spec, layout, manifest, size, resolved)
                self._inspected[key] = known
        except CheckpointError as error:
            raise _invalid(error.field, error.reason) from error
        except (OSError, ValueError) as error:
            raise InvalidArgument("model.path", f"{path!r} cannot be read: {error}") from error
        return known

    async def _fill(self, model: str, path: str, weights: Weights, memory: WeightMemory) -> None:
        """Have a loader process write the weights to `memory`."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        module, *arguments = self._memories.loader
        arguments += ["--parent", f"{os.getpid()}", "--path", path, "--dtype", weights.spec.dtype]
        arguments += ["--layout", weights.layout, "--threads", f"{self._threads}"]
        arguments += memory.loader_arguments()
        errors = os.memfd_create("muxserve-loader-errors", os.MFD_CLOEXEC)
        try:
            child = Child(module, arguments, pass_fds=memory.inherited, stderr=errors)
            size = f"{weights.bytes / MIB:.0f} MiB"
            log.info("loading weights", model=model, size=size, dtype=weights.spec.dtype, pid=child.pid)
            code = await self._wait(child, model, memory)
            said = os.pread(errors, 1 << 16, max(0, os.fstat(errors).st_size - (1 << 16)))
        finally:
            os.close(errors)
        lines = said.decode(errors="replace").strip().splitlines()
        if code != 0:
            raise _load_error(code, lines)
        memory.filled()
        reports = [report for line in lines if (report := _report(line))]
        for warning in (report["warning"] for report in reports if "warning" in report):
            log.warning("weight cache", model=model, reason=warning)
        kept = any(report.get("kept") for report in reports)
        log.info("weights loaded", model=model, seconds=round(loop.time() - started, 2), from_cache=kept)

    async def _wait(self, child: Child, model: str, memory: WeightMemory) -> int:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        waiting = asyncio.create_task(child.wait())
        try:
            while not (await asyncio.wait((waiting,), timeout=_REPORT_EVERY))[0]:
                log.info("still loading", model=model, done=memory.progress())
                if loop.time() > deadline:
                    raise Internal(f'loading model "{model}" took longer than {self._timeout:.0f} s')
            return waiting.result()
        finally:
            waiting.cancel()
            await child.end(grace=0.0)


async def _kept(model: str) -> None:
    """They are there."""
    log.info("weights kept in memory", model=model)


def _report(line: str) -> dict[str, object]:
    """What a line of the loader says; empty if it is not one of its own."""
    with suppress(ValueError):
        report = json.loads(line)
        if isinstance(report, dict):
            return report
    return {}


def _load_error(code: int, lines: list[str]) -> Exception:
    last = lines[-1] if lines else "it said nothing"
    found = _report(last)
    if "field" in found and "reason" in found:
        field, reason = str(found["field"]), str(found["reason"])
        if code == 2:
            return _invalid(field, reason)
        last = f"{field}: {reason}"
    log.error("loader failed", code=code, stderr="\n".join(lines[-20:]))
    return Internal(f"the loader ended with code {code}: {last}")


def _invalid(field: str, reason: str) -> InvalidArgument:
    """A checkpoint's fault as one of the request that named it."""
    return InvalidArgument(f"model.{field}" if field in ("path", "dtype") else field, reason)


def _fingerprint(path: Path) -> tuple[object, ...]:
    """Changes when a file of the checkpoint does. What does not exist has one too: reading it says so."""
    path = path.resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    stats = [(file.name, file.stat()) for file in files if file.exists()]
    return (path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
