"""`WeightStore`: weights in shared memory, loaded once however many models use them, within a budget."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from muxserve.common.errors import Internal, InvalidArgument, Overloaded
from muxserve.engine.checkpoint import CheckpointError, RequestedDType, open_checkpoint
from muxserve.engine.messages import WeightLayout
from muxserve.engine.weights import weights_memfd
from muxserve.worker.child import Child
from muxserve.worker.shapes import MIB, Weights

log = structlog.get_logger(__name__)

WEIGHT_LAYOUT: WeightLayout = "panels"
"""What this worker's executors want."""

_REPORT_EVERY = 5.0
"""Seconds between lines in the log while a model loads."""


@dataclass(frozen=True, slots=True)
class WeightCacheOptions:
    """Where weights that were dequantised are kept, and how many bytes of them."""

    directory: Path
    limit: int


@dataclass(slots=True)
class _Entry:
    fd: int
    bytes: int
    users: int
    filled: asyncio.Task[None]


class WeightStore:
    """Memory of weights, by fingerprint. Every `acquire` that returned is undone by one `release`.

    budget: bytes of all weights together. threads: of a loader. timeout: seconds that a load may take.
    """

    def __init__(
        self, budget: int, threads: int, timeout: float, cache: WeightCacheOptions | None = None
    ) -> None:
        self.budget = budget
        self._cache = cache
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

    async def acquire(self, model: str, path: str, weights: Weights) -> int:
        """A descriptor of memory that holds the weights; it stays the store's.

        Raises Overloaded if they do not fit, InvalidArgument if the checkpoint turns out broken, Internal.
        """
        entry = self._entries.get(weights.fingerprint)
        if entry is None:
            self._check_budget(model, weights)
            fd = weights_memfd(weights.bytes)
            filling = asyncio.create_task(self._fill(model, path, weights, fd), name=f"load-{model}")
            entry = self._entries[weights.fingerprint] = _Entry(fd, weights.bytes, 0, filling)
        entry.users += 1
        try:
            await asyncio.shield(entry.filled)
        except BaseException:
            await self.release(weights)
            raise
        return entry.fd

    async def release(self, weights: Weights) -> None:
        """The last release ends a load that is still going on, and gives the memory back."""
        entry = self._entries[weights.fingerprint]
        entry.users -= 1
        if entry.users == 0:
            del self._entries[weights.fingerprint]
            entry.filled.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await entry.filled
            os.close(entry.fd)

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
                resolved = (*key[:-1], checkpoint.spec.dtype)
                known = Weights(
                    checkpoint.spec,
                    WEIGHT_LAYOUT,
                    checkpoint.manifest(WEIGHT_LAYOUT),
                    checkpoint.weight_bytes(WEIGHT_LAYOUT),
                    resolved,
                )
                self._inspected[key] = known
        except CheckpointError as error:
            raise _invalid(error.field, error.reason) from error
        except (OSError, ValueError) as error:
            raise InvalidArgument("model.path", f"{path!r} cannot be read: {error}") from error
        return known

    async def _fill(self, model: str, path: str, weights: Weights, fd: int) -> None:
        """Have a loader process write the weights to `fd`."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        arguments = ["--parent", f"{os.getpid()}", "--path", path, "--dtype", weights.spec.dtype]
        arguments += ["--layout", weights.layout, "--fd", f"{fd}", "--threads", f"{self._threads}"]
        if self._cache is not None:
            arguments += ["--cache", f"{self._cache.directory}", "--cache-limit", f"{self._cache.limit}"]
        errors = os.memfd_create("muxserve-loader-errors", os.MFD_CLOEXEC)
        try:
            child = Child("muxserve.worker.loader_process", arguments, pass_fds=[fd], stderr=errors)
            size = f"{weights.bytes / MIB:.0f} MiB"
            log.info("loading weights", model=model, size=size, dtype=weights.spec.dtype, pid=child.pid)

            def progress() -> str:
                # Memory is given to a memfd page by page, as it is written.
                return f"{min(1.0, os.fstat(fd).st_blocks * 512 / weights.bytes):.0%}"

            code = await self._wait(child, model, progress)
            said = os.pread(errors, 1 << 16, max(0, os.fstat(errors).st_size - (1 << 16)))
        finally:
            os.close(errors)
        lines = said.decode(errors="replace").strip().splitlines()
        if code != 0:
            raise _load_error(code, lines)
        reports = [report for line in lines if (report := _report(line))]
        for warning in (report["warning"] for report in reports if "warning" in report):
            log.warning("weight cache", model=model, reason=warning)
        kept = any(report.get("kept") for report in reports)
        log.info("weights loaded", model=model, seconds=round(loop.time() - started, 2), from_cache=kept)

    async def _wait(self, child: Child, model: str, progress: Callable[[], str]) -> int:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        waiting = asyncio.create_task(child.wait())
        try:
            while not (await asyncio.wait((waiting,), timeout=_REPORT_EVERY))[0]:
                log.info("still loading", model=model, done=progress())
                if loop.time() > deadline:
                    raise Internal(f'loading model "{model}" took longer than {self._timeout:.0f} s')
            return waiting.result()
        finally:
            waiting.cancel()
            await child.end(grace=0.0)


def _report(line: str) -> dict[str, object]:
    """What a line of the loader says; empty if it is not one of its own."""
    with suppress(ValueError):
        report = json.loads(line)
        if isinstance(report, dict):
            return report
    return {}


def _load_error(code: int, lines: list[str]) -> Exception:
    if code == 2 and lines:
        found = _report(lines[-1])
        if "field" in found and "reason" in found:
            return _invalid(str(found["field"]), str(found["reason"]))
    log.error("loader failed", code=code, stderr="\n".join(lines[-20:]))
    return Internal(f"the loader ended with code {code}: {lines[-1] if lines else 'it said nothing'}")


def _invalid(field: str, reason: str) -> InvalidArgument:
    """A checkpoint's fault as one of the request that named it."""
    return InvalidArgument(f"model.{field}" if field in ("path", "dtype") else field, reason)


def _fingerprint(path: Path) -> tuple[object, ...]:
    """Changes when a file of the checkpoint does. What does not exist has one too: reading it says so."""
    path = path.resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    stats = [(file.name, file.stat()) for file in files if file.exists()]
    return (path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
