"""How `up` starts a process that cannot outlive it.

    python -m muxserve.cli.child PARENT_PID -m MODULE ARG...   runs a Python module
    python -m muxserve.cli.child PARENT_PID FILE ARG...        becomes another program

The bond to the parent is made inside the new process, so that `up` runs no Python code between fork and exec.
"""

from __future__ import annotations

import os
import runpy
import sys

from muxserve.common.parent import die_with_parent


def main() -> None:
    parent, *command = sys.argv[1:]
    die_with_parent(int(parent))
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        os.execv(command[0], command)


if __name__ == "__main__":
    main()
