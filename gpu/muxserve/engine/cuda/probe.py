"""What a GPU offers for lanes, and the partition that was chosen from it."""

from __future__ import annotations

import shutil
from typing import Any

from muxserve.engine.cuda.driver import Driver, DriverError, bindings
from muxserve.engine.cuda.green import GreenContexts
from muxserve.engine.cuda.lanes import Partition, TimeSlices
from muxserve.engine.cuda.mps import CONTROL_PROGRAM
from muxserve.engine.cuda.runtime import DeviceError
from muxserve.engine.shares import Found, Offer


def probe(device: int, api: Any = None, mps_program: str = CONTROL_PROGRAM) -> Found:
    """Look at a device, for `shares.detect`. Raises nothing: what fails is not there, and `missing` says why.

    api: `cuda.bindings.driver`, loaded if None. Leaves no context in this process, though the driver may
    take longer than a second for making one: to be asked where lanes are to be made, in an executor.
    """
    mps = shutil.which(mps_program) is not None
    try:
        driver = Driver(api if api is not None else bindings(), device)
    except (DeviceError, DriverError) as error:
        return Found(mps=mps, missing=str(error))
    try:
        return _found(driver, mps)
    finally:
        driver.close()


def open_partition(offer: Offer, driver: Driver) -> tuple[Partition, str]:
    """The lanes that were chosen, and the line that says why they are these. Where green contexts were not
    asked for and turn out not to work, time slices. Raises DeviceError, DriverError; nothing left behind."""
    if offer.partition in ("none", "mps"):
        return TimeSlices(driver, offer.partition), offer.reason
    if offer.partition != "green_contexts":
        raise DeviceError("partition", f"{offer.partition} is not for a GPU")
    try:
        return GreenContexts(driver), offer.reason
    except (DeviceError, DriverError) as error:
        if offer.asked:
            raise DeviceError("partition", f"green contexts cannot be made: {error}") from error
        return TimeSlices(driver), f"{offer.reason}; but {error}: jobs share all SMs by time slices"


def _found(driver: Driver, mps: bool) -> Found:
    version = sms = 0
    try:
        version, sms = driver.version(), driver.sm_count()
        whole = driver.sm_resource()
        if whole.divides:
            driver.split(whole, whole.minimum)
    except DriverError as error:
        return Found(driver_version=version, sms=sms, mps=mps, missing=str(error))
    return Found(driver_version=version, sms=whole.sms, lane_sms=whole.minimum, mps=mps)
