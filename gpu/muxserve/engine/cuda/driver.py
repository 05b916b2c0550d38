"""`Driver`: the calls of the CUDA driver that lanes are made with, over `cuda.bindings.driver`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from muxserve.engine.cuda.runtime import DeviceError

_SM_COUNT, _CAPABILITY_MAJOR = 16, 75
"""CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR."""
_SM_RESOURCE = 1
"""CU_DEV_RESOURCE_TYPE_SM."""
_GREEN_DEFAULT_STREAM = 1
"""CU_GREEN_CTX_DEFAULT_STREAM, without which none is made."""
_NON_BLOCKING = 1
"""CU_STREAM_NON_BLOCKING: streams of green contexts have to be."""
_NO_TIMING = 2
"""CU_EVENT_DISABLE_TIMING."""


class DriverError(RuntimeError):
    """A call of the driver failed, or the driver, or its bindings, do not have it."""


@dataclass(frozen=True, slots=True)
class SmResource:
    """A set of multiprocessors, of a device or split off it. Splits are in multiples of `alignment`, and have
    at least `minimum` of them."""

    raw: Any
    sms: int
    minimum: int
    alignment: int

    @property
    def divides(self) -> bool:
        """Whether it is enough for two lanes."""
        return self.sms >= 2 * self.minimum


class Driver:
    """What we use of the driver, for one device. Streams are integers (`CUstream`), errors DriverErrors.

    Holds the device's primary context, which torch and CuPy use too, until `close`; calls are for the thread
    that made it, and for others that have made the device theirs.
    """

    def __init__(self, api: Any, device: int) -> None:
        """api: `cuda.bindings.driver`."""
        self._api = api
        self._calls("cuInit", 0)
        self.device = device
        self._device = self._call("cuDeviceGet", device)
        # Retained and current before the first green context: else each of them would set it up and tear it
        # down again.
        context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._holds_context = True
        try:
            self._calls("cuCtxSetCurrent", context)
        except DriverError:
            self.close()
            raise

    @classmethod
    def load(cls, device: int) -> Driver:
        """Raises DeviceError if there are no bindings, DriverError if no driver or device."""
        return cls(bindings(), device)

    def close(self) -> None:
        """Let go of the primary context; a second call does nothing."""
        if self._holds_context:
            self._holds_context = False
            self._calls("cuDevicePrimaryCtxRelease", self._device)

    def version(self) -> int:
        """Of CUDA, as 12040 for 12.4."""
        return int(self._call("cuDriverGetVersion"))

    def sm_count(self) -> int:
        """Multiprocessors that this process may use: under MPS, its percentage of the device's."""
        return int(self._call("cuDeviceGetAttribute", self._attribute(_SM_COUNT), self._device))

    def sm_resource(self) -> SmResource:
        """The device's multiprocessors, to be split."""
        raw = self._call(
            "cuDeviceGetDevResource", self._device, self._enum("CUdevResourceType", _SM_RESOURCE)
        )
        # CUDA 13 says what it rounds to; what 12 rounds to is in its documentation.
        major = int(self._call("cuDeviceGetAttribute", self._attribute(_CAPABILITY_MAJOR), self._device))
        known = 8 if major >= 9 else 4 if major == 8 else 2
        alignment = getattr(raw.sm, "smCoscheduledAlignment", 0) or (known if major >= 9 else 2)
        minimum = getattr(raw.sm, "minSmPartitionSize", 0) or known
        return SmResource(raw, int(raw.sm.smCount), int(minimum), int(alignment))

    def split(self, whole: SmResource, sms: int) -> tuple[SmResource, SmResource]:
        """A group of at least `sms`, and all others."""
        groups, count, rest = self._calls("cuDevSmResourceSplitByCount", 1, whole.raw, 0, sms)
        if int(count) != 1 or len(groups) != 1:
            raise DriverError(f"cuDevSmResourceSplitByCount: {count} groups of {sms} SMs")
        first = SmResource(groups[0], int(groups[0].sm.smCount), whole.minimum, whole.alignment)
        return first, SmResource(rest, int(rest.sm.smCount), whole.minimum, whole.alignment)

    def green_context(self, resource: SmResource) -> Any:
        """A context whose work runs on those multiprocessors only. To be destroyed after its streams."""
        descriptor = self._call("cuDevResourceGenerateDesc", [resource.raw], 1)
        return self._call("cuGreenCtxCreate", descriptor, self._device, _GREEN_DEFAULT_STREAM)

    def destroy_green_context(self, context: Any) -> None:
        self._calls("cuGreenCtxDestroy", context)

    def green_stream(self, context: Any, priority: int) -> int:
        """A stream of a green context. Smaller numbers go first."""
        return int(self._call("cuGreenCtxStreamCreate", context, _NON_BLOCKING, priority))

    def stream(self, priority: int) -> int:
        """A stream on all multiprocessors."""
        return int(self._call("cuStreamCreateWithPriority", _NON_BLOCKING, priority))

    def destroy_stream(self, stream: int) -> None:
        """Wait for what is on it, and destroy it."""
        self._calls("cuStreamSynchronize", stream)
        self._calls("cuStreamDestroy", stream)

    def priorities(self) -> tuple[int, int]:
        """(least, greatest): the greatest is the smaller number."""
        least, greatest = self._calls("cuCtxGetStreamPriorityRange")
        return int(least), int(greatest)

    def order(self, first: int, then: int) -> None:
        """What is put on stream `then` from now on waits for what is on `first` now. Does not wait itself."""
        event = self._call("cuEventCreate", _NO_TIMING)
        try:
            self._calls("cuEventRecord", event, first)
            self._calls("cuStreamWaitEvent", then, event, 0)
        finally:
            self._calls("cuEventDestroy", event)  # the driver keeps it for as long as it is waited for

    def _attribute(self, number: int) -> Any:
        return self._enum("CUdevice_attribute", number)

    def _enum(self, name: str, number: int) -> Any:
        return getattr(self._api, name)(number)

    def _call(self, name: str, *arguments: Any) -> Any:
        (value,) = self._calls(name, *arguments)
        return value

    def _calls(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """What the call gives beside its status."""
        try:
            status, *values = getattr(self._api, name)(*arguments)
        except AttributeError as error:
            raise DriverError(f"{name}: these CUDA bindings do not have it") from error
        except RuntimeError as error:  # no driver, or one without this entry point
            raise DriverError(f"{name}: {error}") from error
        if int(status) != 0:
            raise DriverError(f"{name}: {getattr(status, 'name', status)}")
        return tuple(values)


def bindings() -> Any:
    """`cuda.bindings.driver`. Raises DeviceError if it is not installed."""
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise DeviceError("device", f"lanes need cuda-bindings (install muxserve[cuda]): {error}") from error
