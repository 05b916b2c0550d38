"""`python -m muxserve.worker.loader_process --parent PID …`: the engine's loader, ended with its worker."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from muxserve.common.parent import die_with_parent
from muxserve.engine import loader

if TYPE_CHECKING:
    from muxserve.engine.cuda.runtime import CudaRuntime


def main(argv: Sequence[str], runtime: CudaRuntime | None = None) -> int:
    """Arguments after `--parent PID` are the loader's; so is the exit code. runtime: of its device."""
    die_with_parent(int(argv[1]))
    return loader.main(argv[2:], runtime)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
