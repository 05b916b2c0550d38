"""`python -m benchmarks.services.worker`: the worker as a process, with simulated executors."""

from __future__ import annotations

import sys

from muxserve.worker import executors
from muxserve.worker.__main__ import main

if __name__ == "__main__":
    executors._MODULE = "benchmarks.services.engine"
    sys.exit(main())
