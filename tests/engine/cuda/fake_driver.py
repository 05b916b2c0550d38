"""`cuda.bindings.driver` without a GPU: how it is called, the driver's rules, and what was done wrong."""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 914
    CUDA_ERROR_INVALID_HANDLE = 400


class Refused(Exception):
    """Becomes the status that a call returns."""


@dataclass(frozen=True)
class Sm:
    smCount: int
    first: int
    """SMs are [first, first + smCount) of the device."""
    minSmPartitionSize: int = 8
    smCoscheduledAlignment: int = 8


@dataclass(frozen=True)
class Resource:
    sm: Sm


@dataclass
class FakeDriver:
    """A device of `sms` multiprocessors. `absent`: entry points that this driver does not have."""

    sms: int = 132
    version: int = 13000
    absent: frozenset[str] = frozenset()
    most_contexts: int = 64
    contexts: dict[int, Sm] = field(default_factory=dict)
    streams: dict[int, int | None] = field(default_factory=dict)
    """The green context of each, if it has one."""
    priorities: dict[int, int] = field(default_factory=dict)
    retained: int = 0
    events: set[int] = field(default_factory=set)
    waits: list[tuple[int, int]] = field(default_factory=list)
    """(stream, what it waits for), in order."""
    synchronised: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    _numbers: Any = field(default_factory=lambda: itertools.count(1000))
    _recorded: dict[int, int] = field(default_factory=dict)

    CUdevice_attribute = staticmethod(int)
    CUdevResourceType = staticmethod(int)

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if not name.startswith("cu") or not hasattr(type(self), f"_{name}"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            if name in self.absent:
                raise RuntimeError(f'Function "{name}" not found')
            try:
                values = getattr(self, f"_{name}")(*arguments)
            except Refused as refused:
                return (refused.args[0],)
            values = values if isinstance(values, tuple) else () if values is None else (values,)
            return (CUresult.CUDA_SUCCESS, *values)

        return call

    def check(self) -> None:
        """Nothing was done wrong, and nothing is left."""
        left = (self.contexts, self.streams, self.events, self.retained)
        if self.wrong or any(left):
            raise AssertionError(f"wrong: {self.wrong}, left: {left}")

    def _cuInit(self, flags: int) -> None:
        assert flags == 0

    def _cuDriverGetVersion(self) -> int:
        return self.version

    def _cuDeviceGet(self, ordinal: int) -> int:
        if ordinal != 0:
            raise Refused(CUresult.CUDA_ERROR_INVALID_DEVICE)
        return ordinal

    def _cuDeviceGetAttribute(self, attribute: int, device: int) -> int:
        return {16: self.sms, 75: 9}[attribute]

    def _cuDevicePrimaryCtxRetain(self, device: int) -> str:
        self.retained += 1
        return "primary"

    def _cuDevicePrimaryCtxRelease(self, device: int) -> None:
        self.retained -= 1
        if not self.retained and (self.contexts or self.streams):
            self.wrong.append("the primary context went before what is in it")

    def _cuCtxSetCurrent(self, context: str) -> None:
        assert context == "primary"

    def _cuCtxGetStreamPriorityRange(self) -> tuple[int, int]:
        return 0, -5

    def _cuDeviceGetDevResource(self, device: int, kind: int) -> Resource:
        assert kind == 1
        return Resource(Sm(self.sms, 0))

    def _cuDevSmResourceSplitByCount(
        self, groups: int, resource: Resource, flags: int, least: int
    ) -> tuple[list[Resource], int, Resource]:
        assert (groups, flags) == (1, 0)
        sm = resource.sm
        count = max(8, -(-least // 8) * 8)  # as the driver rounds
        if count > sm.smCount:
            raise Refused(CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION)
        rest = replace(sm, smCount=sm.smCount - count, first=sm.first + count)
        return [Resource(replace(sm, smCount=count))], 1, Resource(rest)

    def _cuDevResourceGenerateDesc(self, resources: list[Resource], count: int) -> Sm:
        assert len(resources) == count == 1
        if not resources[0].sm.smCount:
            raise Refused(CUresult.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION)
        return resources[0].sm

    def _cuGreenCtxCreate(self, descriptor: Sm, device: int, flags: int) -> int:
        if not flags:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        if len(self.contexts) == self.most_contexts:
            raise Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        context = next(self._numbers)
        self.contexts[context] = descriptor
        return int(context)

    def _cuGreenCtxDestroy(self, context: int) -> None:
        if context in self.streams.values():
            self.wrong.append("a green context went before its streams")
        if self.contexts.pop(context, None) is None:
            self.wrong.append("a green context was destroyed twice")

    def _cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> int:
        if context not in self.contexts:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        return self._stream(context, flags, priority)

    def _cuStreamCreateWithPriority(self, flags: int, priority: int) -> int:
        return self._stream(None, flags, priority)

    def _stream(self, context: int | None, flags: int, priority: int) -> int:
        if flags != 1:
            raise Refused(CUresult.CUDA_ERROR_INVALID_VALUE)
        stream = int(next(self._numbers))
        self.streams[stream], self.priorities[stream] = context, priority
        return stream

    def _cuStreamSynchronize(self, stream: int) -> None:
        self._known(stream)
        self.synchronised.append(stream)

    def _cuStreamDestroy(self, stream: int) -> None:
        self._known(stream)
        if stream not in self.synchronised:
            self.wrong.append("a stream went with work on it")
        del self.streams[stream]

    def _cuEventCreate(self, flags: int) -> int:
        event = int(next(self._numbers))
        self.events.add(event)
        return event

    def _cuEventRecord(self, event: int, stream: int) -> None:
        self._known(stream)
        self._recorded[event] = stream

    def _cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> None:
        self._known(stream)
        self.waits.append((stream, self._recorded[event]))

    def _cuEventDestroy(self, event: int) -> None:
        self.events.remove(event)

    def _known(self, stream: int) -> None:
        if stream not in self.streams:
            self.wrong.append("a stream was used after its end")
            raise Refused(CUresult.CUDA_ERROR_INVALID_HANDLE)
