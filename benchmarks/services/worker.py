"""`python -m benchmarks.services.worker`: the worker as a process, with simulated executors."""

from __future__ import annotations

import sys

from muxserve.worker.__main__ import main
from muxserve.worker.device import CpuDevice

if __name__ == "__main__":
    CpuDevice.executor = ("benchmarks.services.engine",)
    sys.exit(main())
