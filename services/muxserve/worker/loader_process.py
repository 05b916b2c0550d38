"""`python -m muxserve.worker.loader_process --parent PID …`: the engine's loader, ended with its worker."""

from __future__ import annotations

import sys

from muxserve.common.parent import die_with_parent
from muxserve.engine import loader


def main() -> int:
    """Arguments after `--parent PID` are the loader's; so is the exit code."""
    die_with_parent(int(sys.argv[2]))
    return loader.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(main())
